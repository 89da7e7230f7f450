"""Turns a matplotlib figure into a short inline SVG for a page.

matplotlib writes every coordinate with six decimals, every style at every element, and a group around nearly
everything. A page shows none of it: coordinates are rounded to a tenth of a pixel, equal styles are written once, grid
lines of one style become one path, and the markers of a line become one path that carries an SVG `<marker>`.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from matplotlib.figure import Figure

from nextn.report.svg_path import moved_down, rounded, rounded_path

INK, MUTED, FRAME = "#010101", "#020202", "#030303"
"""Stand-ins for the page's colours of text, of lesser text and of lines."""

NUM_ARM_COLOURS = 8

_ROLES = {INK: "--ink", MUTED: "--muted", FRAME: "--frame"}
_SVG = "{http://www.w3.org/2000/svg}"
_INHERITED = {"fill": "none", "stroke-linecap": "round", "stroke-width": "1.4"}
"""Written once, at the root."""
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class _Shape:
    """A path or a text as matplotlib draws it, its style and clip resolved.

    Attributes:
        style: CSS declarations.
        clip: id of its clip path in matplotlib's drawing, None where it has none.
        path: the `d` of a path; for markers, the points that they stand at; empty for a text.
        marker: the `d` of the marker at each point, its centre at 0, 0; empty for other shapes.
        line_style: CSS declarations of the line through markers; empty where there is none.
        text: attributes of position and words of a text; empty for a path.
    """

    style: str
    clip: str | None
    path: str = ""
    marker: str = ""
    line_style: str = ""
    text: tuple[str, str] = ("", "")


def depth_colour(depth: int) -> str:
    """Stand-in for the page's colour of an MTP depth."""
    return f"#05{depth:02x}00"


def arm_colour(index: int) -> str:
    """Stand-in for the page's colour of arm `index`. The colours repeat after `NUM_ARM_COLOURS`."""
    return f"#06{index % NUM_ARM_COLOURS:02x}00"


def to_svg(figure: Figure, name: str, alternative: str) -> str:
    """Return the figure as one `<svg>` element: no prolog, metadata, style sheet or fixed colour, unique ids.

    Args:
        figure: drawn in `INK`, `MUTED`, `FRAME` and the stand-ins of depths and arms alone.
        name: of the plot, unique on its page; its ids begin with it.
        alternative: text for readers who do not see the plot.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    clips = {clip.get("id", ""): clip for clip in root.iter(f"{_SVG}clipPath")}
    drawing = _Drawing(name)
    body = drawing.write(list(_shapes(root)))
    rectangles = [drawing.clip_path(clips[clip][0], number) for clip, number in drawing.clip_numbers.items()]
    definitions = "".join([*rectangles, *drawing.markers.values()])
    label = re.sub(r'[<>&"]', " ", alternative)
    inherited = "; ".join(f"{name}: {value}" for name, value in _INHERITED.items())
    head = f'<svg viewBox="{root.get("viewBox")}" role="img" aria-label="{label}" style="{inherited}">'
    return head + _page_colours((f"<defs>{definitions}</defs>" if definitions else "") + body) + "</svg>"


def _page_colours(svg: str) -> str:
    """Replace the stand-ins by the page's CSS variables."""
    svg = re.sub(r"#05([0-9a-f]{2})00", lambda m: f"var(--depth-{int(m.group(1), 16)})", svg)
    svg = re.sub(r"#06([0-9a-f]{2})00", lambda m: f"var(--arm-{int(m.group(1), 16)})", svg)
    for stand_in, variable in _ROLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg


# ------------------------------------------------------------------------------------------------------------- reading


def _shapes(root: ElementTree.Element) -> Iterator[_Shape]:
    """Yield what a drawing shows, in the order in which it is drawn."""
    marker_paths: dict[str, tuple[str, str]] = {}
    for definitions in root.iter(f"{_SVG}defs"):
        for path in definitions.findall(f"{_SVG}path"):
            marker_paths[path.get("id", "")] = (path.get("d", ""), path.get("style", ""))

    def visit(element: ElementTree.Element, clip: str | None) -> Iterator[_Shape]:
        clip = _clip_of(element) or clip
        if element.tag == f"{_SVG}g":
            for child in element:
                yield from visit(child, clip)
        elif element.tag == f"{_SVG}path":
            style = _style(element.get("style", ""))
            if style != "fill: none":  # matplotlib's frames and legends without colour
                yield _Shape(style, clip, rounded_path(element.get("d", ""), 1))
        elif element.tag == f"{_SVG}text":
            yield _Shape(_style(element.get("style", "")), clip, text=(_position(element), element.text or ""))
        elif element.tag == f"{_SVG}use" and element.get("x") == "0":  # an area, which begins at the lower edge
            area, own_style = marker_paths[element.get(_HREF, "").removeprefix("#")]
            style = _style(f"{element.get('style', '')}; {own_style}")
            yield _Shape(style, clip, rounded_path(moved_down(area, float(element.get("y", "0"))), 1))
        elif element.tag == f"{_SVG}use":
            marker, own_style = marker_paths[element.get(_HREF, "").removeprefix("#")]
            style = _style(f"{element.get('style', '')}; {own_style}")
            point = f"M{rounded(element.get('x', '0'), 1)} {rounded(element.get('y', '0'), 1)}"
            yield _Shape(style, clip, point, rounded_path(marker, 2))

    yield from visit(root.find(f"{_SVG}g") or root, None)


def _clip_of(element: ElementTree.Element) -> str | None:
    found = re.fullmatch(r"url\(#(.*)\)", element.get("clip-path", ""))
    return found and found.group(1)


def _style(text: str) -> str:
    """Return CSS declarations without font families; a later declaration of a property replaces an earlier one.

    >>> _style("font: 12px 'DejaVu Sans', sans-serif; fill: #020202; text-anchor: start; stroke: red; stroke: blue")
    'font-size: 12px; fill: #020202; stroke: blue'
    """
    text = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", text)
    declarations = dict(part.strip().split(": ", 1) for part in text.split(";") if part.strip())
    declarations.pop("font-family", None)
    usual = {"text-anchor": "start", "stroke-linejoin": "miter"}
    return "; ".join(f"{name}: {value}" for name, value in declarations.items() if usual.get(name) != value)


def _position(text: ElementTree.Element) -> str:
    """Return x, y and, where it turns the text, the rotation."""
    x, y = (rounded(text.get(name, "0"), 1) for name in "xy")
    transform = text.get("transform", "")
    if turned := re.fullmatch(r"rotate\((-?[\d.]+) [-\d. ]+\)", transform):
        angle = rounded(turned.group(1), 1)
        transform = "" if angle == "0" else f"rotate({angle} {x} {y})"
    if moved := re.fullmatch(r"translate\(([-\d.]+) ([-\d.]+)\)(.*)", transform):
        x, y = (rounded(moved.group(index), 1) for index in (1, 2))
        transform = f"translate({x} {y}){moved.group(3)}"
        return f'transform="{transform}"'
    return f'x="{x}" y="{y}"' + (f' transform="{transform}"' if transform else "")


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass
class _Drawing:
    """Writes shapes, and numbers the clip paths and markers that they need."""

    name: str
    clip_numbers: dict[str, int] = field(default_factory=dict)
    markers: dict[tuple[str, str], str] = field(default_factory=dict)

    def write(self, shapes: Sequence[_Shape]) -> str:
        """Write the grid first, then all other paths in the order given, then the texts."""
        grid = [shape for shape in shapes if _is_grid(shape)]
        texts = [shape for shape in shapes if shape.text[0]]
        others = [shape for shape in shapes if not (shape.text[0] or _is_grid(shape))]
        lines = [*_merged(sorted(grid, key=_look))]
        for colour, same in itertools.groupby(others, _only_colour):  # within one colour, the order cannot be seen
            shapes_of_colour = list(same)
            lines += _merged(sorted(shapes_of_colour, key=_look) if colour else shapes_of_colour)
        parts = []
        for clip, of_clip in itertools.groupby(lines, lambda shape: shape.clip):
            inner = "".join(map(self._path, _with_markers(of_clip)))
            parts.append(inner if clip is None else f'<g clip-path="url(#{self._clip_id(clip)})">{inner}</g>')
        for font, of_font in itertools.groupby(texts, _font):
            inner = "".join(map(_text, of_font))
            parts.append(f'<g style="{font}">{inner}</g>')
        return "".join(parts)

    def clip_path(self, rectangle: ElementTree.Element, number: int) -> str:
        """Write the clip path of that number."""
        places = " ".join(f'{key}="{rounded(rectangle.get(key, "0"), 1)}"' for key in ("x", "y", "width", "height"))
        return f'<clipPath id="{self.name}-c{number}"><rect {places}/></clipPath>'

    def _clip_id(self, clip: str) -> str:
        return f"{self.name}-c{self.clip_numbers.setdefault(clip, len(self.clip_numbers))}"

    def _path(self, shape: _Shape) -> str:
        style = _path_style(shape.style)
        if not shape.marker:
            return f'<path d="{shape.path}" style="{style}"/>'
        if shape.path.count(" ") == 1 and not shape.line_style:
            place = shape.path.removeprefix("M")
            return f'<path transform="translate({place})" d="{shape.marker}" style="{style}"/>'
        if (shape.marker, style) not in self.markers:
            number = len(self.markers)
            attributes = f'id="{self.name}-m{number}" markerUnits="userSpaceOnUse"'
            marker = f'<marker {attributes}><path d="{shape.marker}" style="{style}"/></marker>'
            self.markers[shape.marker, style] = marker
        number = list(self.markers).index((shape.marker, style))
        line = _path_style(shape.line_style or "fill: none")
        style = ";".join(filter(None, (line, f"marker:url(#{self.name}-m{number})")))
        return f'<path d="{shape.path.replace(" -", "-")}" style="{style}"/>'


def _with_markers(shapes: Iterable[_Shape]) -> Iterator[_Shape]:
    """Yield the shapes, a line and the markers on its points as one."""
    waiting: _Shape | None = None
    for shape in shapes:
        if waiting is not None and shape.marker and shape.path.replace(" -", "-") == waiting.path:
            yield replace(shape, line_style=waiting.style)
            waiting = None
            continue
        if waiting is not None:
            yield waiting
        waiting = shape
    if waiting is not None:
        yield waiting


def _path_style(style: str) -> str:
    """Return what a path does not inherit from the root, without spaces.

    >>> _path_style("fill: none; stroke: #010101; stroke-width: 1.4; stroke-linecap: round")
    'stroke:#010101'
    >>> _path_style("fill: #010101; stroke: #010101")
    'fill:#010101;stroke:#010101;stroke-width:1'
    """
    declarations = dict(part.split(": ", 1) for part in style.split("; "))
    if "stroke" in declarations:
        declarations.setdefault("stroke-width", "1")
    if "stroke-dasharray" in declarations:  # where matplotlib names no cap, it means butt
        declarations.setdefault("stroke-linecap", "butt")
    return ";".join(f"{name}:{value}" for name, value in declarations.items() if _INHERITED.get(name) != value)


def _is_grid(shape: _Shape) -> bool:
    return shape.clip is not None and not shape.marker and f"stroke: {FRAME}" in shape.style


def _only_colour(shape: _Shape) -> str | None:
    """Return the colour of a shape that has one colour, and no other's."""
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", shape.style))
    return colours.pop() if len(colours) == 1 else None


def _look(shape: _Shape) -> tuple[str, str, str, str]:
    """What shapes must have in common to become one path. A filled or translucent shape stays alone."""
    can_merge = shape.marker or (shape.style.startswith("fill: none") and "opacity" not in shape.style)
    return shape.clip or "", shape.marker, shape.style, "" if can_merge else shape.path


def _merged(shapes: Sequence[_Shape]) -> Iterator[_Shape]:
    """Yield neighbours of one look as one path."""
    for _, group in itertools.groupby(shapes, _look):
        first, *others = group
        if first.marker:
            points = " ".join(shape.path.removeprefix("M") for shape in (first, *others))
            yield _Shape(first.style, first.clip, f"M{points}", first.marker)
        else:
            yield _Shape(first.style, first.clip, "".join(shape.path for shape in (first, *others)))


def _font(shape: _Shape) -> str:
    """Return the declarations that neighbouring texts share: all but the fill."""
    return "; ".join(part for part in shape.style.split("; ") if not part.startswith("fill"))


def _text(shape: _Shape) -> str:
    position, words = shape.text
    fill = next(part for part in shape.style.split("; ") if part.startswith("fill: "))
    return f'<text style="{fill}" {position}>{escape(words)}</text>'
