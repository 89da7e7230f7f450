"""Progress of a run: a bar with step, loss, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BAR_EVERY_S = 0.5
"""On a terminal the bar moves at most this often, since its loss has to be read back from the device."""

PLAIN_LINE_EVERY_S = 10.0
"""Where there is no terminal, at most one line in this many seconds (and one for the last step)."""


class HasLoss(Protocol):
    """A step of which the loss can be read."""

    @property
    def loss(self) -> float:
        """In nats."""
        ...


class TrainingProgress:
    """Shows how far a run is; a context manager.

    Args:
        num_steps: steps of the whole run.
        num_done: steps already done when it starts.
        console: where to write; the default is standard error.
    """

    def __init__(self, num_steps: int, num_done: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.num_steps = num_steps
        self._first = num_done
        self._started = self._last_line = time.perf_counter()
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=num_steps, completed=num_done, status="")

    def update(self, step: int, report: HasLoss, tok_per_s: float) -> None:
        """Show that `step` steps are done; the loss is read only when it is shown."""
        now = time.perf_counter()
        is_last = step == self.num_steps
        if self._bar is not None:
            if now - self._last_line >= BAR_EVERY_S or is_last:
                self._last_line = now
                self._bar.update(self._task, completed=step, status=_status(report.loss, tok_per_s))
            return
        if now - self._last_line >= PLAIN_LINE_EVERY_S or is_last:
            self._last_line = now
            status = _status(report.loss, tok_per_s)
            left_s = (self.num_steps - step) * (now - self._started) / max(step - self._first, 1)
            minutes, seconds = divmod(round(left_s), 60)
            self.say(f"step {step}/{self.num_steps}  {status}  {minutes}:{seconds:02d} left")

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _status(loss: float, tok_per_s: float) -> str:
    return f"loss {loss:.3f}  {tok_per_s:,.0f} tokens/s"
