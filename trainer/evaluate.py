"""Held-out accuracy and divergence of a student, from the sequences it wrote greedily. Pure functions.

Knows no engine and no tokenizer: how the sequences came about and how ids become text is the caller's.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from common.sequence import Ids, MixedSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """One evaluation. None where there is nothing to average."""

    num_prompts: int
    num_answers: int  # prompts whose answer is known
    accuracy: float | None  # share of those that were answered right
    mean_divergence: float | None  # nats per token the student proposed
    mean_length: float  # new tokens per sequence


def evaluate(
    sequences: list[MixedSequence], answer_pattern: re.Pattern[str], decode: Callable[[Ids], str]
) -> EvaluationReport:
    """Summarise sequences the student wrote alone, greedily. ``decode`` must leave special tokens out."""
    assert sequences, "an evaluation needs at least one sequence"
    answered = [sequence for sequence in sequences if sequence.prompt.answer is not None]
    num_right = sum(is_right(sequence, answer_pattern, decode) for sequence in answered)
    divergences = np.concatenate([sequence.divergences for sequence in sequences]).astype(np.float64)
    judged = divergences[~np.isnan(divergences)]
    return EvaluationReport(
        num_prompts=len(sequences),
        num_answers=len(answered),
        accuracy=num_right / len(answered) if answered else None,
        mean_divergence=float(judged.mean()) if judged.size else None,
        mean_length=sum(map(len, sequences)) / len(sequences),
    )


def is_right(sequence: MixedSequence, answer_pattern: re.Pattern[str], decode: Callable[[Ids], str]) -> bool:
    """Whether the completion's answer is the prompt's, but for white space around it.

    A prompt's answer may be a whole worked solution: where the pattern is found in it, what it finds is compared.
    """
    answer = sequence.prompt.answer
    assert answer is not None, f"prompt {sequence.prompt.prompt_id} has no answer"
    expected = extract_answer(answer, answer_pattern) or answer.strip()
    return extract_answer(decode(sequence.token_ids), answer_pattern) == expected


def extract_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """The last match's last group that took part, stripped; the whole match where the pattern has no group.

    None when the pattern is not found.
    """
    answer = None
    for match in pattern.finditer(text):
        groups = [group for group in match.groups() if group is not None]
        answer = groups[-1] if groups else match.group()
    return None if answer is None else answer.strip()


def compile_answer_pattern(pattern: str, key: str = "evaluation.answer_pattern") -> re.Pattern[str]:
    """Raises UserError naming the key when it is no regular expression; call it before a run starts."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: got {pattern!r}, expected a regular expression: {error}") from error
