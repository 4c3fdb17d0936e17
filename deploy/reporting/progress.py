"""Shows a run's progress in a terminal or a pipe. Independent of where the numbers come from."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from deploy.reporting.terminal import make_console, plain


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """The numbers shown for one training step."""

    step: int  # from 1
    loss: float  # nats
    switch_rate: float
    teacher_share: float
    tokens_per_s: float
    rollout_s: float
    train_s: float
    sync_s: float
    accuracy: float | None = None  # held-out accuracy, if this step was evaluated
    probe: float | None = None  # nats, rms; log-prob difference between trainer and engine after the sync

    def text(self) -> str:
        parts = [
            f"loss {self.loss:.4f}",
            f"switch rate {self.switch_rate:.3f}",
            f"teacher {self.teacher_share:.1%}",
            f"{self.tokens_per_s:.0f} tokens/s",
            f"rollout {self.rollout_s:.1f} s, train {self.train_s:.1f} s, sync {self.sync_s:.1f} s",
        ]
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.3f}")
        if self.probe is not None:
            parts.append(f"probe {self.probe:.1e}")
        return "  ".join(parts)


class ProgressDisplay:
    """The progress of a run: a live bar in a terminal, otherwise one plain line per step.

    with ProgressDisplay(total_steps) as display:
        display.note("starting engines")
        display.step(StepLine(...))
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``first_step`` is this process's first step, after a resume; ``clock`` returns seconds."""
        self._total_steps = total_steps
        self._first_step = first_step
        self._console = console or make_console(stderr=True)
        self._clock = clock
        self._started_at_s: float | None = None  # start of the first step; the start of the engines does not count
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step - 1)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def note(self, message: str) -> None:
        """Show a message between steps."""
        if self._progress is not None:
            self._progress.update(self._task, description=message)
        self._console.print(plain(message), soft_wrap=True)

    def step(self, line: StepLine) -> None:
        """Show a finished step."""
        text = f"{line.text()}  {self._time_left(line)}"
        if self._progress is not None:
            self._progress.update(self._task, completed=line.step, description=text)
        # The bar only shows the last step, so evaluations are also printed above it.
        if self._progress is None or line.accuracy is not None:
            self._console.print(Text(f"step {line.step}/{self._total_steps}  {text}"), soft_wrap=True)

    def _time_left(self, line: StepLine) -> str:
        now_s = self._clock()
        if self._started_at_s is None:
            self._started_at_s = now_s - line.rollout_s - line.train_s - line.sync_s
        num_steps = line.step - self._first_step + 1
        return f"{_duration((now_s - self._started_at_s) / num_steps * (self._total_steps - line.step))} left"


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest_s:02d} s" if minutes else f"{rest_s} s"
