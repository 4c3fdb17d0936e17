"""Prints a finished run and its trace to a terminal or a pipe. Independent of where the records come from.

Nothing depends on color alone: the teacher's tokens are between « and », and every switch opens a new pair. Generated
text is never interpreted as markup, and control characters are made visible.
"""

import io
import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rollout_server.traces.records import SequenceRecord, SequenceTrace, TokenRecord

_PIPE_WIDTH = 10_000  # without a terminal nothing is wrapped or cut
_PREVIEW_CHARACTERS = 48
_TEACHER_STYLE = "bold magenta"
_SWITCH_STYLE = "bold magenta reverse"
_STYLES = {"student": "cyan", "teacher": _TEACHER_STYLE, "dataset": "green"}
_ABSENT = "-"


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr, as wide as the terminal, or without one as wide as the text needs."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # for characters that the locale can't encode
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
            plain(sequence.sequence_id),
            str(sequence.step),
            plain(sequence.policy),
            str(sequence.num_tokens),
            f"{sequence.num_teacher_tokens / sequence.num_tokens:.0%}",
            str(sequence.num_switches),
            _whole(sequence.first_switch),
            _decimal(sequence.mean_divergence),
            str(sequence.num_wasted_tokens),
            sequence.finish_reason,
            plain(_shortened(sequence.completion_text)),
        )
    (console or make_console()).print(table)


def print_sequence(trace: SequenceTrace, console: Console | None = None) -> None:
    """The prompt, the text with the teacher's tokens marked, and one row per token."""
    console = console or make_console()
    sequence = trace.sequence
    head = f"{sequence.sequence_id}  step {sequence.step}  {sequence.policy}  seed {sequence.seed}"
    lines = [plain(head), _labelled("prompt", plain(sequence.prompt_text))]
    if sequence.answer is not None:
        lines.append(_labelled("expected answer", plain(sequence.answer)))
    lines.append(_labelled("completion", _marked_text(trace.tokens)))
    if "".join(token.text for token in trace.tokens) != sequence.completion_text:
        lines.append(_labelled("decoded together", plain(sequence.completion_text)))
    is_given = all(token.source == "dataset" for token in trace.tokens)
    legend = "the dataset answer" if is_given else "« » the teacher's tokens, a switch at each «"
    lines.append(Text(f"{legend}; finish reason: {sequence.finish_reason}\n"))
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)
    console.print(_token_table(trace.tokens))


def visible(text: str) -> str:
    """Control characters as escapes (``\\n``, ``\\x1b``), everything else unchanged."""
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
    "seconds": ("seconds in total", "{:.1f}"),
    "max_probe_nats": ("largest probe difference, nats", "{:.1e}"),
    "max_probe_rms_nats": ("  largest root mean square of a sync", "{:.1e}"),
    "resumed": ("resumed", "{}"),
    "faults": ("faults", "{}"),
    "prompts_set_aside": ("prompts quarantined", "{}"),
    "steps": ("steps", "{}"),
    "sequences": ("sequences", "{}"),
    "tokens": ("tokens", "{}"),
    "held_out_prompts": ("held-out prompts", "{}"),
    "student": ("student", "{}"),
    "accuracy": ("held-out accuracy", "{:.3f}"),
    "num_answers": ("held-out prompts with an answer", "{}"),
    "num_prompts": ("held-out prompts", "{}"),
    "mean_divergence": ("mean divergence from the teacher, nats", "{:.4f}"),
    "mean_length": ("mean length, tokens", "{:.1f}"),
    "run_dir": ("run folder", "{}"),
}


def print_summary(summary: Mapping[str, object], console: Console | None = None) -> None:
    """The final table: known rows with their labels in the order above, then all others. None and an empty list are
    shown as ``-``.
    """
    table = _table("", "")
    for key in sorted(summary, key=[*_ROWS, *summary].index):
        label, template = _ROWS.get(key, (key, "{}"))
        value = summary[key]
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or None
        table.add_row(plain(label), plain(_ABSENT if value is None else template.format(value)))
    (console or make_console()).print(table)


def _table(*columns: str) -> Table:
    """Columns by name; names that end in ``>`` are right-aligned. In a narrow terminal, cells are wrapped."""
    table = Table(box=None, show_header=any(columns), header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    return table


def plain(text: str) -> Text:
    """Text that is never interpreted as markup and never moves the cursor."""
    return Text(visible(text))


def _labelled(label: str, text: Text) -> Text:
    return Text.assemble((f"{label}: ", "bold"), text)


def _shortened(text: str) -> str:
    return text if len(text) <= _PREVIEW_CHARACTERS else f"{text[: _PREVIEW_CHARACTERS - 1]}…"


def _whole(value: int | None) -> str:
    return _ABSENT if value is None else str(value)


def _decimal(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4f}"
