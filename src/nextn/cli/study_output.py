"""What `nextn study` prints: the plan, its progress with the time left, and the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from nextn.cli.console import figures_table
from nextn.mtp.cost import model_cost, training_flops, weightless_model
from nextn.study.compare import known_metric, shown
from nextn.study.definition import ModelEvaluationConfig
from nextn.study.jobs import Job
from nextn.study.results import Comparison, StudyResult, Verdict
from nextn.study.run import StudyPlan
from nextn.study.tables import NOT_RESOLVED, comparisons_of, difference_text, title_of
from nextn.wording import NOT_MEASURED, count, duration, plural

PLAIN_LINE_EVERY_S = 30.0
"""Where there is no terminal, at most one line in this many seconds, and one for every finished run."""

_METRICS = (
    "flops_overhead", "time_overhead", "steps_ratio", "effective_speedup", "al_greedy", "decode_speedup_greedy",
    "parse_share",
)  # fmt: skip
_VERDICT_STYLES: dict[Verdict, str] = {"confirmed": "green", "refuted": "red", "not resolved at this scale": "yellow"}


def print_plan(console: Console, plan: StudyPlan, devices: Sequence[str]) -> None:
    """Settings with their size, cost and number of runs, and how long all of it will take."""
    loaded = plan.loaded
    table = figures_table(
        f"{escape(loaded.study.title)}: {plural(len(loaded.variants), 'variant')}, "
        f"{plural(len(loaded.study.seeds), 'seed')}, size {loaded.scale}",
        ("variant", "parameters", "tokens", "FLOPs", "step", "runs", "to do"),
    )
    for given in loaded.variants:
        recipe = plan.recipes[given.name]
        training, length = recipe.training, recipe.data.sequence_length
        cost = model_cost(weightless_model(recipe.model, recipe.mtp), length)
        jobs = [job for job in plan.jobs if job.run.variant == given.name]
        table.add_row(
            escape(given.name),
            count(cost.num_parameters),
            count(training.num_steps * training.batch_size * length),
            f"{training_flops(recipe)[-1]:.2e}",
            f"{1000 * plan.speeds.mean_step_s(given.name, recipe):.0f} ms",
            str(len(jobs)),
            str(sum(not job.is_done() for job in jobs)),
        )
    console.print(table)
    missing = plan.missing
    if not missing:
        console.print("everything is trained and measured")
        return
    seconds = sum(map(_predicted_s, missing)) / _num_parallel(devices)
    where = f" on {', '.join(devices)}" if devices != ["auto"] else ""
    console.print(f"{len(missing)} runs to do{where}: about {duration(seconds)} on a quiet machine", highlight=False)


def print_result(console: Console, result: StudyResult) -> None:
    """The comparison, and the claims with their verdicts."""
    console.print(_comparison_table(result))
    for claim in result.claims:
        style = _VERDICT_STYLES[claim.verdict]
        console.print(f"[{style}]{claim.verdict}[/]: {escape(claim.text)}", highlight=False, soft_wrap=True)
        for test in claim.tests:
            line = f"  claimed {test.claimed}; measured {test.measured}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _comparison_table(result: StudyResult) -> Table:
    """A row per variant: loss, its difference from the baseline, costs, decoding, parsing code."""
    found = comparisons_of(result)
    names = [name for name in _METRICS if any(metric == name for _, metric in found)]
    table = figures_table(
        f"{escape(result.title)}: mean of seeds {' '.join(map(str, result.seeds))}",
        ("variant", "loss", "less the baseline's", *map(title_of, names)),
    )
    for facts in result.variants:
        loss = found.get((facts.name, "loss"))
        row = [_mean(loss), _loss_difference(loss), *(_mean(found.get((facts.name, name))) for name in names)]
        table.add_row(escape(facts.name), *row, style="bold" if facts.name == result.baseline else None)
    return table


def _mean(comparison: Comparison | None) -> str:
    if comparison is None:
        return NOT_MEASURED
    return shown(comparison.value.mean, known_metric(comparison.metric))


def _loss_difference(comparison: Comparison | None) -> str:
    if comparison is None or comparison.difference is None:
        return NOT_MEASURED
    return NOT_RESOLVED if comparison.resolved is False else difference_text(comparison, comparison.value.n)


def _num_parallel(devices: Sequence[str]) -> int:
    """Devices that work at full speed side by side; workers on one CPU share its cores."""
    return len(set(devices))


def _predicted_s(job: Job) -> float:
    return job.predicted_s * (1 - job.share_done()) + _measuring_s(job.spec.evaluation)


def _measuring_s(evaluation: ModelEvaluationConfig) -> float:
    """Guess of the seconds that measuring a run takes, by what a small model needs; progress corrects it."""
    started_s = 5.0
    batched = (
        2 * evaluation.num_prompts * evaluation.max_new_tokens
        + evaluation.num_completions * evaluation.completion_length / 2
    )
    one_by_one = 4 * evaluation.num_timed_prompts * evaluation.num_repeats * evaluation.max_new_tokens
    return started_s + batched / 1000 + one_by_one / 300


def _state(job: Job) -> str:
    share = job.share_done()
    return "measuring" if share == 1 else f"{share:.0%}"


class StudyProgress:
    """Runs done, what runs now, and the time left; a context manager. The first runs done correct the estimate."""

    def __init__(self, console: Console, plan: StudyPlan, devices: Sequence[str]) -> None:
        self.console, self._num_parallel = console, _num_parallel(devices)
        self._jobs, self._todo = plan.jobs, list(plan.missing)
        self._started = self._last_line = time.perf_counter()
        self._predicted_s = sum(map(_predicted_s, self._todo))
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(BarColumn(bar_width=30), TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("", total=max(self._predicted_s, 1e-9))

    def update(self, running: Sequence[Job]) -> None:
        """Show the jobs that run now, and the time left."""
        left_s = sum(map(_predicted_s, self._todo))
        done_s, elapsed_s = self._predicted_s - left_s, time.perf_counter() - self._started
        pace = elapsed_s / done_s if done_s > 0.05 * self._predicted_s else 1 / self._num_parallel
        num_done = len(self._jobs) - len(self._todo)
        now = "; ".join(f"{job.run.variant}, seed {job.run.seed}: {_state(job)}" for job in running)
        text = f"{num_done}/{len(self._jobs)} runs, about {duration(left_s * pace)} left  {now}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done_s, description=text)
        elif time.perf_counter() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = time.perf_counter()
            self.console.print(text)

    def finished(self, job: Job) -> None:
        """Say that a run is done."""
        self._todo.remove(job)
        length = "" if job.run.ladder is None else f", {job.run.ladder:g} times as long"
        self.console.print(f"done: {job.run.variant}{length}, seed {job.run.seed} ({job.folder})")

    def __enter__(self) -> StudyProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
