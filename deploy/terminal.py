"""What a run and its trace look like in a terminal, and in a pipe. Knows records, never where they come from.

Nothing is told by colour alone: the teacher's tokens stand between « and », and every switch opens a new pair. Text
that models wrote is shown as it is, never as markup, with control characters made visible.
"""

import io
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rollout_server.traces.records import SequenceRecord, SequenceTrace, TokenRecord

_PIPE_WIDTH = 10_000  # nothing is wrapped or cut where no terminal limits the line
_PREVIEW_CHARACTERS = 48
_TEACHER_STYLE = "bold magenta"
_SWITCH_STYLE = "bold magenta reverse"
_STYLES = {"student": "cyan", "teacher": _TEACHER_STYLE, "dataset": "green"}
_ABSENT = "-"


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr, as wide as the terminal or, without one, as the text needs."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # where the locale can't write a character
    return Console(file=stream, highlight=False, width=None if stream.isatty() else _PIPE_WIDTH)


# ------------------------------------------------------------------------------------------------------------- traces


def print_sequences(sequences: Sequence[SequenceRecord], console: Console | None = None) -> None:
    """One row per sequence."""
    table = _table(
        "sequence",
        "step>",
        "policy",
        "tokens>",
        "teacher>",
        "switches>",
        "first switch>",
        "mean divergence>",
        "wasted>",
        "finish",
        "completion",
    )
    for sequence in sequences:
        table.add_row(
            _plain(sequence.sequence_id),
            str(sequence.step),
            _plain(sequence.policy),
            str(sequence.num_tokens),
            f"{sequence.num_teacher_tokens / sequence.num_tokens:.0%}",
            str(sequence.num_switches),
            _whole(sequence.first_switch),
            _decimal(sequence.mean_divergence),
            str(sequence.num_wasted_tokens),
            sequence.finish_reason,
            _plain(_shortened(sequence.completion_text)),
        )
    (console or make_console()).print(table)


def print_sequence(trace: SequenceTrace, console: Console | None = None) -> None:
    """The prompt, the text with the teacher's part marked, then one row per token."""
    console = console or make_console()
    sequence = trace.sequence
    head = f"{sequence.sequence_id}  step {sequence.step}  {sequence.policy}  seed {sequence.seed}"
    lines = [_plain(head), _labelled("prompt", _plain(sequence.prompt_text))]
    if sequence.answer is not None:
        lines.append(_labelled("expected answer", _plain(sequence.answer)))
    lines.append(_labelled("completion", _marked_text(trace.tokens)))
    if "".join(token.text for token in trace.tokens) != sequence.completion_text:
        lines.append(_labelled("decoded together", _plain(sequence.completion_text)))
    is_given = all(token.source == "dataset" for token in trace.tokens)
    legend = "the answer as the data has it" if is_given else "« » the teacher's tokens, a switch at each «"
    lines.append(Text(f"{legend}; finish reason: {sequence.finish_reason}\n"))
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)
    console.print(_token_table(trace.tokens))


def visible(text: str) -> str:
    """Control characters as escapes (``\\n``, ``\\x1b``), everything else as it is."""
    return "".join(
        character if character.isprintable() or character == " " else character.encode("unicode_escape").decode()
        for character in text
    )


def _marked_text(tokens: Iterable[TokenRecord]) -> Text:
    text = Text()
    in_guidance = False
    for token in tokens:
        is_teacher = token.source == "teacher"
        if in_guidance and (token.is_switch or not is_teacher):
            text.append("»", _TEACHER_STYLE)
            in_guidance = False
        if is_teacher and not in_guidance:
            text.append("«", _TEACHER_STYLE)
            in_guidance = True
        style = _SWITCH_STYLE if token.is_switch else _STYLES[token.source]
        text.append(visible(token.text), style)
    if in_guidance:
        text.append("»", _TEACHER_STYLE)
    return text


def _token_table(tokens: Iterable[TokenRecord]) -> Table:
    table = _table(
        "position>", "text", "source", "divergence>", "threshold>", "student log-prob>", "teacher log-prob>", "rank>"
    )
    for token in tokens:
        source = f"{token.source} «" if token.is_switch else token.source
        style = _STYLES[token.source]
        table.add_row(
            str(token.position),
            Text(visible(token.text), style),
            Text(source, style),
            _decimal(token.divergence),
            _decimal(token.threshold),
            _decimal(token.student_logprob),
            _decimal(token.teacher_logprob),
            _whole(token.student_rank),
        )
    return table


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """What a training step shows of itself."""

    step: int  # from 1
    loss: float  # nats
    switch_rate: float
    teacher_share: float
    tokens_per_s: float
    rollout_s: float
    train_s: float
    sync_s: float
    accuracy: float | None = None  # held out, where this step was evaluated
    probe: float | None = None  # nats; largest log-prob difference between trainer and engine after the sync

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
    """The progress of a run: a live bar in a terminal, one plain line per step without one.

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
        """``first_step`` is where a resumed run goes on; ``clock`` tells seconds."""
        self._total_steps = total_steps
        self._first_step = first_step
        self._console = console or make_console(stderr=True)
        self._clock = clock
        self._started_at_s: float | None = None  # of the first step; starting engines is no part of a step's time
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
        """Say what happens between steps."""
        if self._progress is not None:
            self._progress.update(self._task, description=message)
        self._console.print(_plain(message), soft_wrap=True)

    def step(self, line: StepLine) -> None:
        """A step is done."""
        text = f"{line.text()}  {self._time_left(line)}"
        if self._progress is not None:
            self._progress.update(self._task, completed=line.step, description=text)
        # The bar shows the last step only; evaluations stay in sight above it.
        if self._progress is None or line.accuracy is not None:
            self._console.print(Text(f"step {line.step}/{self._total_steps}  {text}"), soft_wrap=True)

    def _time_left(self, line: StepLine) -> str:
        now_s = self._clock()
        if self._started_at_s is None:
            self._started_at_s = now_s - line.rollout_s - line.train_s - line.sync_s
        num_steps = line.step - self._first_step + 1
        return f"{_duration((now_s - self._started_at_s) / num_steps * (self._total_steps - line.step))} left"


# ------------------------------------------------------------------------------------------------------------- summary

_ROWS: dict[str, tuple[str, str]] = {
    "accuracy_before": ("held-out accuracy before", "{:.3f}"),
    "accuracy_after": ("held-out accuracy after", "{:.3f}"),
    "switch_rate": ("switch rate", "{:.3f}"),
    "switch_rate_first": ("  in the first steps", "{:.3f}"),
    "switch_rate_last": ("  in the last steps", "{:.3f}"),
    "teacher_share": ("share of teacher tokens", "{:.1%}"),
    "mean_switch_position": ("mean position of the first switch", "{:.1f}"),
    "tokens_per_s": ("tokens per second in rollout", "{:.0f}"),
    "rollout_s": ("seconds in rollout", "{:.1f}"),
    "train_s": ("seconds in training", "{:.1f}"),
    "sync_s": ("seconds in weight sync", "{:.1f}"),
    "seconds": ("seconds in all", "{:.1f}"),
    "max_probe_nats": ("largest probe difference, nats", "{:.1e}"),
    "resumed": ("resumed", "{}"),
    "faults": ("faults", "{}"),
    "prompts_set_aside": ("prompts set aside", "{}"),
    "steps": ("steps", "{}"),
    "sequences": ("sequences", "{}"),
    "tokens": ("tokens", "{}"),
    "held_out_prompts": ("held-out prompts", "{}"),
    "student": ("student", "{}"),
    "accuracy": ("held-out accuracy", "{:.3f}"),
    "num_answers": ("held-out prompts with an answer", "{}"),
    "num_prompts": ("held-out prompts", "{}"),
    "mean_divergence": ("mean divergence to the teacher, nats", "{:.4f}"),
    "mean_length": ("mean length, tokens", "{:.1f}"),
    "run_dir": ("run folder", "{}"),
}


def print_summary(summary: Mapping[str, object], console: Console | None = None) -> None:
    """The final table: known rows under their names, in the order above, then whatever else there is. None, or nothing
    in a list, is ``-``.
    """
    table = _table("", "")
    for key in sorted(summary, key=[*_ROWS, *summary].index):
        label, template = _ROWS.get(key, (key, "{}"))
        value = summary[key]
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or None
        table.add_row(_plain(label), _plain(_ABSENT if value is None else template.format(value)))
    (console or make_console()).print(table)


def _table(*columns: str) -> Table:
    """Columns by name; those whose name ends in ``>`` are set to the right. In a narrow terminal cells are folded."""
    table = Table(box=None, show_header=any(columns), header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    return table


def _plain(text: str) -> Text:
    """Text that is never taken for markup and never moves the cursor."""
    return Text(visible(text))


def _labelled(label: str, text: Text) -> Text:
    return Text.assemble((f"{label}: ", "bold"), text)


def _shortened(text: str) -> str:
    return text if len(text) <= _PREVIEW_CHARACTERS else f"{text[: _PREVIEW_CHARACTERS - 1]}…"


def _whole(value: int | None) -> str:
    return _ABSENT if value is None else str(value)


def _decimal(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest_s:02d} s" if minutes else f"{rest_s} s"
