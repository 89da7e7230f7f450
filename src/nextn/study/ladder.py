"""Estimates the baseline at another budget, from baselines trained at several lengths (the ladder).

A point of the ladder is a whole run: its steps and its final loss. Between points the loss is linear in the logarithm
of the steps; beyond them the line through the last two goes on, down to half of the shortest run and up to twice the
longest, and nothing is said further out.

A longer run that is no better is noise of its seed. Such neighbours become one point at their mean (isotonic
regression by pooling adjacent violators), so that the line falls everywhere and can be read both ways. A running
minimum would do so too, but it keeps every lucky run and forgets every unlucky one, so the baseline would look better
the longer its ladder is.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nextn.study.results import CurvePoint, RunResult, TargetReached

LADDER_METRICS = ("steps_ratio", "flops_ratio", "effective_speedup", "loss_at_equal_flops", "loss_at_equal_time")
"""Measures that need a ladder."""


@dataclass(frozen=True)
class Crossing:
    """When a run's curve reaches a loss: optimizer steps, FLOPs and seconds of training by then."""

    step: float
    flops: float
    training_s: float


def baseline_loss(points: Sequence[tuple[float, float]], steps: float) -> float | None:
    """Final loss (nats) of a baseline trained for `steps`; None: too far from any that was trained.

    Args:
        points: (steps, final loss) of every baseline of one seed, in any order.
        steps: length asked about.

    Halfway between 100 and 400 steps, in logarithms, is 200:

    >>> ladder = [(100, 2.0), (400, 1.0)]
    >>> round(baseline_loss(ladder, 200), 6), round(baseline_loss(ladder, 790), 3), baseline_loss(ladder, 810)
    (1.5, 0.509, None)
    """
    xs, ys = _decreasing(points)
    if len(xs) < 2 or not _within_reach(points, math.log(steps)):
        return None
    return _on_line(xs, ys, math.log(steps))


def baseline_steps(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Steps that the baseline needs for a final loss (nats): the inverse of `baseline_loss`; None: out of its reach.

    >>> ladder = [(100, 2.0), (400, 1.0)]
    >>> round(baseline_steps(ladder, 1.5), 6), baseline_steps(ladder, 0.3)
    (200.0, None)

    The run of 200 steps is no better than that of 100, so both count as one of 141 steps with their mean, 2.05:

    >>> round(baseline_steps([(100, 2.0), (200, 2.1), (400, 1.0)], 2.05), 3)
    141.421
    """
    xs, ys = _decreasing(points)
    if len(xs) < 2:
        return None
    log_steps = _on_line(ys[::-1], xs[::-1], loss)
    return math.exp(log_steps) if _within_reach(points, log_steps) else None


def pair_values(run: RunResult, baseline: RunResult, ladder: Sequence[RunResult]) -> dict[str, float]:
    """`LADDER_METRICS` of a run; what lies beyond the ladder's reach is left out, and without a ladder everything.

    A step of the baseline always costs the same, so its FLOPs and seconds at any length follow from its own run.

    Args:
        run: a variant's own run.
        baseline: the baseline's own run of the same seed.
        ladder: the baselines of other lengths of the same seed.
    """
    points = [(float(other.curve[-1].step), other.values["loss"]) for other in (baseline, *ladder)]
    loss, end, baseline_end = run.values["loss"], run.curve[-1], baseline.curve[-1]
    flops_per_step, s_per_step = baseline_end.flops / baseline_end.step, baseline_end.training_s / baseline_end.step
    values = {}
    if (needed := baseline_steps(points, loss)) is not None:
        values["steps_ratio"] = end.step / needed
        values["flops_ratio"] = end.flops / (needed * flops_per_step)
        values["effective_speedup"] = needed * s_per_step / end.training_s
    if (at_flops := baseline_loss(points, end.flops / flops_per_step)) is not None:
        values["loss_at_equal_flops"] = loss - at_flops
    if (at_time := baseline_loss(points, end.training_s / s_per_step)) is not None:
        values["loss_at_equal_time"] = loss - at_time
    return values


def reached(curve: Sequence[CurvePoint], loss: float) -> Crossing | None:
    """When a curve first reaches a loss (nats), interpolated in the logarithm of the step; None: it never does.

    A curve that begins below the loss has reached it at its first point.

    >>> curve = [CurvePoint(100, 0, 1e6, 10.0, 2.0), CurvePoint(400, 0, 4e6, 40.0, 1.0)]
    >>> reached(curve, 1.5), reached(curve, 0.9)
    (Crossing(step=200.0..., flops=2000000.0..., training_s=20.0...), None)
    """
    for before, after in zip((curve[0], *curve), curve, strict=False):
        if after.loss > loss:
            continue
        if before is after:
            return Crossing(after.step, after.flops, after.training_s)
        start, end = (math.log(max(point.step, 1)) for point in (before, after))
        step = math.exp(start + (end - start) * (before.loss - loss) / (before.loss - after.loss))
        share = (step - before.step) / (after.step - before.step)
        flops = before.flops + share * (after.flops - before.flops)
        return Crossing(step, flops, before.training_s + share * (after.training_s - before.training_s))
    return None


def reach_targets(runs: Sequence[RunResult], losses: Sequence[float]) -> tuple[TargetReached, ...]:
    """When every variant reaches every loss (nats): variants in the order of the runs, losses as given.

    Args:
        runs: of a study; those of the ladder are passed over.
        losses: target losses.
    """
    curves: dict[str, list[tuple[CurvePoint, ...]]] = {}
    for run in runs:
        if run.ladder is None:
            curves.setdefault(run.variant, []).append(run.curve)
    return tuple(_target(variant, curves[variant], loss) for variant in curves for loss in losses)


def _target(variant: str, curves: Sequence[Sequence[CurvePoint]], loss: float) -> TargetReached:
    found = [crossing for curve in curves if (crossing := reached(curve, loss)) is not None]
    if not found:
        return TargetReached(variant, loss, 0, len(curves), None, None, None)
    step, flops, training_s = (
        statistics.fmean(getattr(crossing, name) for crossing in found) for name in ("step", "flops", "training_s")
    )
    return TargetReached(variant, loss, len(found), len(curves), step, flops, training_s)


def _decreasing(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Logarithms of steps, strictly rising, and losses, strictly falling: neighbours that break this are pooled."""
    blocks: list[tuple[int, float, float]] = []  # number of points, mean log(steps), mean loss
    for steps, loss in sorted(points):
        block = (1, math.log(steps), loss)
        while blocks and (blocks[-1][2] <= block[2] or blocks[-1][1] >= block[1]):
            block = _pooled(blocks.pop(), block)
        blocks.append(block)
    return [block[1] for block in blocks], [block[2] for block in blocks]


def _pooled(one: tuple[int, float, float], other: tuple[int, float, float]) -> tuple[int, float, float]:
    n, m = one[0], other[0]
    return n + m, (n * one[1] + m * other[1]) / (n + m), (n * one[2] + m * other[2]) / (n + m)


def _on_line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The line through points of rising x, its first and last piece going on beyond them."""
    i = min(max(bisect.bisect_left(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * ((x - xs[i - 1]) / (xs[i] - xs[i - 1]))


def _within_reach(points: Sequence[tuple[float, float]], log_steps: float) -> bool:
    lengths = [steps for steps, _ in points]
    return math.log(min(lengths) / 2) <= log_steps <= math.log(max(lengths) * 2)
