import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from common.sequence import TokenSource
from deploy.reporting.progress import ProgressDisplay, StepLine
from deploy.reporting.terminal import print_sequence, print_sequences, print_summary, visible
from rollout_server.traces.records import SequenceTrace
from rollout_server.traces.writer import TraceWriter
from tests.support.trace_reader import TraceReader

LINE = StepLine(
    step=1, loss=0.25, switch_rate=0.5, teacher_share=0.4, tokens_per_s=800, rollout_s=6, train_s=3, sync_s=1
)
TEXTS = {0: "[red]", 1: "a\n", 2: "\x1b[31m", 3: "« "}


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


@pytest.fixture
def coloured() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False, force_terminal=True, color_system="standard")


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def make_trace(tmp_path, make_sequence) -> Callable[..., SequenceTrace]:
    """A stored and read sequence whose four tokens 0..3 have texts that would harm a terminal."""

    def trace(**arguments: object) -> SequenceTrace:
        def token_texts(token_ids: list[int]) -> list[str]:
            return [TEXTS.get(token_id, f"t{token_id} ") for token_id in token_ids]

        writer = TraceWriter(
            tmp_path, decode=lambda token_ids: "".join(token_texts(token_ids)), token_texts=token_texts
        )
        sequence = make_sequence(**arguments)
        writer.write_segment(1, [sequence])
        found = TraceReader(tmp_path).sequence(sequence.sequence_id)
        assert found is not None
        return found

    return trace


def row_of(output: str, position: int) -> list[str]:
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [str(position)])


def test_without_colour_every_switch_opens_a_mark_and_the_student_closes_it(plain, make_trace):
    trace = make_trace(num_tokens=8, switches=[2, 3, 6], guidance_tokens=1)
    print_sequence(trace, plain)
    text = [visible(token.text) for token in trace.tokens]
    marked = f"{text[0]}{text[1]}«{text[2]}»«{text[3]}»{text[4]}{text[5]}«{text[6]}»{text[7]}"
    assert f"completion: {marked}\n" in printed(plain)
    assert "\x1b" not in printed(plain)


def test_guidance_to_the_end_is_one_mark(plain, make_trace):
    trace = make_trace(num_tokens=6, switches=[2])
    print_sequence(trace, plain)
    assert "«" + "".join(visible(token.text) for token in trace.tokens[2:]) + "»\n" in printed(plain)


def test_each_token_has_a_row_with_all_that_decided_it(plain, make_trace):
    trace = make_trace(num_tokens=6, switches=[4])
    print_sequence(trace, plain)
    for token in trace.tokens:
        row = row_of(printed(plain), token.position)
        assert token.source in row
        assert ("«" in row[2:]) == token.is_switch
        for value in (token.divergence, token.threshold, token.student_logprob, token.teacher_logprob):
            assert ("-" if value is None else f"{value:.4f}") in row


def test_colour_adds_nothing_but_colour(plain, coloured, make_trace):
    trace = make_trace(num_tokens=8, switches=[2, 6], guidance_tokens=2)
    for console in (plain, coloured):
        print_sequences([trace.sequence], console)
        print_sequence(trace, console)
    assert "\x1b[" in printed(coloured)
    assert Text.from_ansi(printed(coloured)).plain.split() == printed(plain).split()


@pytest.mark.parametrize(
    ("text", "shown"), [("[red]", "[red]"), ("a\n", "a\\n"), ("\x1b[31m", "\\x1b[31m"), ("é ", "é ")]
)
def test_control_characters_are_made_visible_and_markup_stays_text(plain, text, shown):
    assert visible(text) == shown
    print_summary({"run_dir": text}, plain)
    assert shown.strip() in printed(plain)


def test_what_a_model_wrote_never_reaches_the_terminal_as_control(plain, make_trace):
    for seed in range(6):
        trace = make_trace(prompt_id="[bold]p[/]", num_tokens=30, seed=seed, switches=[4])
        print_sequence(trace, plain)
        print_sequences([trace.sequence], plain)
    assert "[bold]p[/].0.0" in printed(plain)
    assert "[red]" in printed(plain)
    assert "\\x1b[31m" in printed(plain)
    assert "\x1b" not in printed(plain)


def test_without_a_terminal_each_step_is_one_plain_line(plain):
    now_s = iter([100.0, 120.0])
    with ProgressDisplay(3, console=plain, clock=lambda: next(now_s)) as display:
        display.note("starting engines")
        display.step(LINE)
        display.step(
            StepLine(**{**{name: getattr(LINE, name) for name in LINE.__slots__}, "step": 2, "accuracy": 0.75})
        )
    assert printed(plain).splitlines() == [
        "starting engines",
        "step 1/3  loss 0.2500  switch rate 0.500  teacher 40.0%  800 tokens/s  "
        "rollout 6.0 s, train 3.0 s, sync 1.0 s  20 s left",
        "step 2/3  loss 0.2500  switch rate 0.500  teacher 40.0%  800 tokens/s  "
        "rollout 6.0 s, train 3.0 s, sync 1.0 s  accuracy 0.750  15 s left",
    ]


def test_in_a_terminal_the_bar_tells_the_same(coloured):
    with ProgressDisplay(3, console=coloured) as display:
        display.note("starting engines")
        display.step(LINE)
    output = printed(coloured)
    assert "starting engines" in output
    assert "1/3" in output
    assert "loss 0.2500" in output
    assert output.rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_the_summary_names_what_is_known_and_marks_what_is_not(plain):
    summary = {
        "resumed": 2,
        "weather": "fine",
        "accuracy_before": 0.25,
        "accuracy_after": None,
        "teacher_share": 0.5,
        "run_dir": "runs/one",
    }
    print_summary(summary, plain)
    rows = [line.rsplit(None, 1) for line in printed(plain).splitlines()]
    assert ["held-out accuracy before", "0.250"] in rows
    assert ["held-out accuracy after", "-"] in rows
    assert ["share of teacher tokens", "50.0%"] in rows
    assert ["run folder", "runs/one"] in rows
    assert ["resumed", "2"] in rows
    assert rows[-1] == ["weather", "fine"]


def test_a_given_answer_is_nobodys_and_says_so(plain, tmp_path, make_sequence):
    sequence = make_sequence(num_tokens=4, switches=[])
    sequence = replace(sequence, sources=np.full(4, TokenSource.DATASET, np.uint8))
    texts = [f"t{token_id} " for token_id in sequence.token_ids]
    writer = TraceWriter(
        tmp_path, decode=lambda ids: "".join(f"t{i} " for i in ids), token_texts=lambda ids: [f"t{i} " for i in ids]
    )
    writer.write_segment(1, [sequence])
    trace = TraceReader(tmp_path).sequence(sequence.sequence_id)
    assert trace is not None
    print_sequence(trace, plain)
    print_sequences([trace.sequence], plain)
    output = printed(plain)
    assert f"completion: {''.join(texts)}" in output
    assert "the dataset answer; finish reason: stop" in output
    assert "«" not in output
    assert row_of(output, 0)[2] == "dataset"
