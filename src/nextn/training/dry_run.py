"""What a run would be, without running it: its size, and how learning rate and depth weights change over its steps."""

from __future__ import annotations

import io
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nextn.config import Recipe, ScheduleConfig
from nextn.data import ByteTokenizer
from nextn.errors import DeviceError
from nextn.files import write_text
from nextn.model.device import resolve_device
from nextn.mtp import MTPModel
from nextn.mtp.cost import model_cost, step_flops, weightless_model
from nextn.objective import Progress, depth_weights, stage_at
from nextn.training import learning_rate_factor, resolve_precision

PLOT_NAME = "schedule.svg"
NUM_ROWS = 14  # of the table, about
NUM_CURVE_STEPS = 1000  # of the plot, beside the steps at which something changes
NUM_BARS = 50  # characters of a curve in the terminal
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nextn",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#e3e1dc",
    "grid.color": "#e3e1dc",
}


@dataclass(frozen=True)
class ScheduledStep:
    """What one step will do; names and conventions as in metrics.jsonl.

    Attributes:
        step: 1-based.
        num_tokens: tokens trained when it is done.
        learning_rate: AdamW's.
        depth_weights: of L_1..L_K.
    """

    step: int
    num_tokens: int
    learning_rate: float
    depth_weights: tuple[float, ...]


def scheduled_step(recipe: Recipe, step: int) -> ScheduledStep:
    """Learning rate and depth weights of step `step` (1-based) of the run.

    >>> scheduled_step(Recipe(), 1)
    ScheduledStep(step=1, num_tokens=4096, learning_rate=5e-05, depth_weights=(0.3,))
    """
    factor = learning_rate_factor(recipe.optimizer, step - 1, recipe.training.num_steps)
    return ScheduledStep(
        step=step,
        num_tokens=step * _tokens_per_step(recipe),
        learning_rate=recipe.optimizer.learning_rate * factor,
        depth_weights=depth_weights(recipe.objective, recipe.mtp.num_depths, _progress_at(recipe, step)),
    )


def changes(recipe: Recipe) -> dict[int, list[str]]:
    """What begins or ends at which step (1-based): warm-up, decay, pieces of lambda, stages of the curriculum.

    >>> from nextn.config import CurriculumConfig, ObjectiveConfig
    >>> changes(Recipe(objective=ObjectiveConfig(curriculum=CurriculumConfig("forward"))))
    {1: ['no depth on'], 20: ['warm-up ends'], 501: ['depths on: 1']}
    """
    optimizer, num_steps, num_depths = recipe.optimizer, recipe.training.num_steps, recipe.mtp.num_depths
    found: list[tuple[int, str]] = []
    if optimizer.num_warmup_steps > 1:
        found.append((optimizer.num_warmup_steps, "warm-up ends"))
    if optimizer.schedule == "wsd":
        stable = range(optimizer.num_warmup_steps, num_steps)
        falls = bisect_left(stable, True, key=lambda step: learning_rate_factor(optimizer, step, num_steps) < 1)
        found.append((stable.start + falls + 1, "learning rate falls"))
    if num_depths:
        for schedule in _simple_schedules(recipe.objective.mtp_lambda):
            position = partial(Progress.measured_in, unit=schedule.unit)
            for boundary in schedule.boundaries:
                at = f"{boundary:g}" if schedule.unit == "share" else f"{boundary:,.0f}"
                text = f"lambda ({schedule.kind}) at {at} {schedule.unit}"
                found.append((_first_step(recipe, position, boundary), text))
        curriculum = recipe.objective.curriculum
        stages = curriculum.stages_for(num_depths)
        for index, stage in enumerate(stages if len(stages) > 1 else ()):
            first = _first_step(recipe, partial(stage_at, curriculum, num_depths), index)
            found.append((first, f"depths on: {', '.join(map(str, stage))}" if stage else "no depth on"))
    steps = sorted({step for step, _ in found if step <= num_steps})
    return {step: [text for at, text in found if at == step] for step in steps}


def print_dry_run(console: Console, recipe: Recipe, run_folder: Path, model: MTPModel | None = None) -> None:
    """Say what the run would be, and write `schedule.svg` into its folder; no corpus is read, nothing is trained.

    Args:
        console: where to print.
        recipe: its settings.
        run_folder: where the run would be.
        model: that the run starts from; None: a fresh one, which is not built.

    Raises:
        ConfigError: the settings contradict each other in a way that only building the model shows.
        CheckpointError: the plot cannot be written.
    """
    header = Table.grid(padding=(0, 2))
    header.add_column(no_wrap=True)
    header.add_column(overflow="fold")  # paths are long, and must be whole
    for name, value in _header(recipe, run_folder, model):
        header.add_row(name, value)
    table = _schedule_table(recipe)
    if not console.is_terminal:  # a file is as wide as its content
        console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(header)
    console.print()
    console.print(table)
    for line in _terminal_plot(recipe, ASCII_BARS if console.options.ascii_only else BARS):
        console.print(line, soft_wrap=True)
    write_text(run_folder / PLOT_NAME, schedule_plot(recipe))
    console.print()
    console.print(f"plot: {run_folder / PLOT_NAME}", soft_wrap=True)


def schedule_plot(recipe: Recipe) -> str:
    """An SVG page: depth weights above, learning rate below, over the run's steps."""
    import matplotlib  # slow to import, and only a dry run draws here
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    points = [scheduled_step(recipe, step) for step in _curve_steps(recipe)]
    steps = [point.step for point in points]
    num_depths = recipe.mtp.num_depths
    ramp = LinearSegmentedColormap.from_list("depths", ["#0f7ba8", "#3462cf", "#6d2fa3"])
    with matplotlib.rc_context(_STYLE):
        figure = Figure((8, 5), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        for depth in range(1, num_depths + 1):
            weights = [point.depth_weights[depth - 1] for point in points]
            width = 1.5 + 4 * (num_depths - depth) / num_depths  # equal curves stay visible below each other
            colour = ramp((depth - 1) / max(1, num_depths - 1))
            upper.plot(steps, weights, color=colour, linewidth=width, label=f"depth {depth}")
        if num_depths:
            upper.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        upper.set_ylim(bottom=0)
        upper.set_ylabel("weight of the depth's loss")
        lower.plot(steps, [point.learning_rate for point in points], color="#1c1d20", linewidth=1.5)
        lower.set_ylim(bottom=0)
        lower.set_ylabel("learning rate")
        lower.set_xlabel("step")
        lower.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _header(recipe: Recipe, run_folder: Path, model: MTPModel | None) -> Iterator[tuple[str, str]]:
    training, optimizer, mtp = recipe.training, recipe.optimizer, recipe.mtp
    yield "run folder", str(run_folder)
    if recipe.trunk.from_ is not None:
        yield "trunk", f"from {recipe.trunk.from_}, train = {recipe.trunk.train}"
    yield "steps", f"{training.num_steps:,} of {training.batch_size} x {recipe.data.sequence_length} tokens"
    yield "tokens", f"{training.num_steps * _tokens_per_step(recipe):,}"
    yield "MTP", f"{mtp.scheme}, K = {mtp.num_depths}" if mtp.num_depths else "none (K = 0)"
    muon = f"muon, peak {optimizer.muon_learning_rate:g}; the rest "
    peak = f"adamw, peak learning rate {optimizer.learning_rate:g}"
    yield "optimizer", muon * (optimizer.name == "muon") + peak
    try:
        device = resolve_device(training.device)
        precision = resolve_precision(training.precision, device)
        yield "device", f"{device}, {precision.name} ({precision.reason})"
    except DeviceError as error:  # a recipe for another machine may be looked at here
        yield "device", f"not this machine's: {error}"
    if model is None:
        vocab_size = _known_vocab_size(recipe)
        if not vocab_size:
            yield "parameters", f"not known before the corpus is read (tokenizer {recipe.data.tokenizer})"
            return
        model = weightless_model(replace(recipe.model, vocab_size=vocab_size), mtp)
    vocab_size, cost = model.trunk.vocab_size, model_cost(model, recipe.data.sequence_length)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    yield "parameters", f"{cost.num_parameters:,}, of which MTP {cost.num_mtp_parameters:,}; vocabulary {vocab_size:,}"
    if num_trained != cost.num_parameters:
        yield "trained", f"{num_trained:,} parameters"
    length, detach = recipe.data.sequence_length, recipe.objective.detach
    overhead = step_flops(model, length, detach=detach) / step_flops(model, length, ()) - 1
    yield "MTP overhead", f"{overhead:.1%} more training FLOPs per token while all depths are on"


def _known_vocab_size(recipe: Recipe) -> int:
    """V as the settings tell it; 0 where only the corpus or a saved tokenizer does."""
    tokenizer, size = recipe.data.tokenizer, recipe.data.tokenizer.removeprefix("bpe:")
    if recipe.model.vocab_size:
        return recipe.model.vocab_size
    if tokenizer == "bytes":
        return ByteTokenizer().vocab_size
    return int(size) if tokenizer.startswith("bpe:") and size.isdecimal() else 0


def _schedule_table(recipe: Recipe) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    depths = [f"weight {depth}" for depth in range(1, recipe.mtp.num_depths + 1)]
    for heading in ("step", "tokens", "learning rate", *depths):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("here")
    notes = changes(recipe)
    for step in _sampled_steps(recipe, max(6, NUM_ROWS - len(notes))):
        point = scheduled_step(recipe, step)
        weights = [f"{weight:.4g}" for weight in point.depth_weights]
        numbers = [f"{step:,}", f"{point.num_tokens:,}", f"{point.learning_rate:.3g}", *weights]
        table.add_row(*numbers, "; ".join(notes.get(step, ())))
    return table


def _terminal_plot(recipe: Recipe, bars: str) -> Iterator[str]:
    """One line per depth, then the learning rate: bars relative to the line's own maximum, blank where it is 0."""
    points = [scheduled_step(recipe, step) for step in _evenly(recipe.training.num_steps, NUM_BARS)]
    curves = {
        f"weight {depth}": [point.depth_weights[depth - 1] for point in points]
        for depth in range(1, recipe.mtp.num_depths + 1)
    }
    for name, values in (curves | {"learning rate": [point.learning_rate for point in points]}).items():
        highest = max(values)
        levels = [math.ceil(len(bars) * value / highest) if value else 0 for value in values]
        yield f"{name:>13} |{''.join(f' {bars}'[level] for level in levels)}| up to {highest:.4g}"


def _curve_steps(recipe: Recipe) -> list[int]:
    """Sampled steps, and the step before each change, so that a jump is upright."""
    steps = _sampled_steps(recipe, NUM_CURVE_STEPS)
    return sorted({*steps, *(step - 1 for step in changes(recipe) if step > 1)})


def _sampled_steps(recipe: Recipe, num_samples: int) -> list[int]:
    """Evenly spaced steps (1-based), the first and the last among them, and all `changes`."""
    return sorted({*_evenly(recipe.training.num_steps, num_samples), *changes(recipe)})


def _evenly(num_steps: int, num_samples: int) -> list[int]:
    """At most `num_samples` (2 or more) different steps from 1 to `num_steps`.

    >>> _evenly(100, 4), _evenly(2, 4)
    ([1, 34, 67, 100], [1, 2])
    """
    return sorted({1 + round(index * (num_steps - 1) / (num_samples - 1)) for index in range(num_samples)})


def _simple_schedules(schedule: ScheduleConfig) -> Iterator[ScheduleConfig]:
    """The schedule itself, or those a product is made of."""
    if schedule.kind != "product":
        yield schedule
    for factor in schedule.factors:
        yield from _simple_schedules(factor)


def _first_step(recipe: Recipe, position: Callable[[Progress], float], boundary: float) -> int:
    """First step (1-based) at which `position`, which never falls, is at `boundary`; num_steps + 1 if none is."""
    steps = range(1, recipe.training.num_steps + 1)
    return 1 + bisect_left(steps, boundary, key=lambda step: position(_progress_at(recipe, step)))


def _progress_at(recipe: Recipe, step: int) -> Progress:
    """What the trainer knows before step `step` (1-based)."""
    return Progress(step - 1, (step - 1) * _tokens_per_step(recipe), recipe.training.num_steps)


def _tokens_per_step(recipe: Recipe) -> int:
    return recipe.training.batch_size * recipe.data.sequence_length
