import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from common.errors import UserError
from common.sequence import Ids, MixedSequence, TopLogprobs
from trainer.evaluate import EvaluationReport, compile_answer_pattern, evaluate, extract_answer

Make = Callable[..., MixedSequence]


def decode(token_ids: Ids) -> str:
    """Ids are code points."""
    return "".join(map(chr, token_ids))


def answered(make_sequence: Make, completion: str, answer: str | None, divergence: float = 0.5) -> MixedSequence:
    token_ids = np.array(list(map(ord, completion)), np.int32)
    top = TopLogprobs(token_ids[:, None], np.zeros((token_ids.size, 1), np.float32))
    sequence = make_sequence(np.array([1], np.int32), token_ids, top)
    divergences = np.full(token_ids.size, divergence, np.float32)
    return replace(sequence, prompt=replace(sequence.prompt, answer=answer), divergences=divergences)


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("1+2=3\nso 7", r"(.+)$", "so 7"),
        ("so 7\n", r"(.+)$", "so 7"),
        ("#### 5\n#### 6 ", r"#### (\S+)", "6"),
        ("a=1 b=2", r"(\w)=(\d)", "2"),
        ("the answer is 4", r"#### (\d)|answer is (\d)", "4"),
        ("#### 4", r"#### (\d)|answer is (\d)", "4"),
        ("x 12 y 34", r"\d+", "34"),
        ("no number", r"(\d+)", None),
        ("", r"(.+)$", None),
        ("boxed{ 3 }", r"boxed\{(.*)\}", "3"),
    ],
)
def test_the_answer_is_the_last_matchs_last_group(text: str, pattern: str, answer: str | None) -> None:
    assert extract_answer(text, re.compile(pattern)) == answer


def test_a_report_counts_right_answers_lengths_and_divergences(make_sequence: Make) -> None:
    sequences = [
        answered(make_sequence, "1=1", " 1", divergence=1.0),
        answered(make_sequence, "2=3", "2", divergence=0.0),
        answered(make_sequence, "=", "2", divergence=0.0),
        answered(make_sequence, "x=2", "2", divergence=0.0),
    ]
    assert evaluate(sequences, re.compile(r"=(.*)$"), decode) == EvaluationReport(
        num_prompts=4, num_answers=4, accuracy=0.5, mean_divergence=0.3, mean_length=2.5
    )


def test_only_prompts_with_an_answer_count_for_accuracy(make_sequence: Make) -> None:
    sequences = [answered(make_sequence, "1", "1"), answered(make_sequence, "1", None)]
    report = evaluate(sequences, re.compile(r"(.+)$"), decode)
    assert (report.accuracy, report.num_answers, report.num_prompts) == (1.0, 1, 2)


def test_without_answers_there_is_no_accuracy(make_sequence: Make) -> None:
    report = evaluate([answered(make_sequence, "1", None)], re.compile(r"(.+)$"), decode)
    assert report.accuracy is None
    assert report.mean_divergence == 0.5


def test_without_proposals_there_is_no_divergence(make_sequence: Make) -> None:
    assert evaluate([answered(make_sequence, "1", "1", np.nan)], re.compile("1"), decode).mean_divergence is None


def test_a_pattern_that_is_no_regular_expression_is_refused_with_its_key() -> None:
    with pytest.raises(UserError, match=r"^evaluation\.answer_pattern: got '\(', expected a regular expression"):
        compile_answer_pattern("(")
    assert compile_answer_pattern(r"(.+)$").pattern == r"(.+)$"
