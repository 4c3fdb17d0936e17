"""Held-out accuracy and divergence of a student, from sequences with greedy decoding. Pure functions.

Does not depend on an engine or a tokenizer: the caller provides the sequences and turns ids into text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from common.sequence import Ids, MixedSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Results of one evaluation. None if there is nothing to average."""

    num_prompts: int
    num_answers: int  # prompts with a dataset answer
    accuracy: float | None  # fraction of these that were answered correctly
    mean_divergence: float | None  # nats per token that the student proposed
    mean_length: float  # new tokens per sequence


def evaluate(
    sequences: list[MixedSequence], answer_pattern: re.Pattern[str], decode: Callable[[Ids], str]
) -> EvaluationReport:
    """Evaluate sequences that the student generated alone with greedy decoding. ``decode`` must omit special tokens."""
    assert sequences, "an evaluation needs at least one sequence"
    answered = [sequence for sequence in sequences if sequence.prompt.answer is not None]
    num_right = sum(is_right(sequence, answer_pattern, decode) for sequence in answered)
    divergences = np.concatenate([sequence.divergences for sequence in sequences]).astype(np.float64)
    known = divergences[~np.isnan(divergences)]
    return EvaluationReport(
        num_prompts=len(sequences),
        num_answers=len(answered),
        accuracy=num_right / len(answered) if answered else None,
        mean_divergence=float(known.mean()) if known.size else None,
        mean_length=sum(map(len, sequences)) / len(sequences),
    )


def is_right(sequence: MixedSequence, answer_pattern: re.Pattern[str], decode: Callable[[Ids], str]) -> bool:
    """Whether the completion's answer equals the dataset answer, ignoring white space around it.

    The dataset answer may be a whole worked solution. If the pattern matches in it, the match is compared.
    """
    answer = sequence.prompt.answer
    assert answer is not None, f"prompt {sequence.prompt.prompt_id} has no answer"
    expected = extract_answer(answer, answer_pattern) or answer.strip()
    return extract_answer(decode(sequence.token_ids), answer_pattern) == expected


def extract_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """The last group of the last match that took part in it, stripped; the whole match if the pattern has no group.

    None if the pattern does not match.
    """
    answer = None
    for match in pattern.finditer(text):
        groups = [group for group in match.groups() if group is not None]
        answer = groups[-1] if groups else match.group()
    return None if answer is None else answer.strip()


def compile_answer_pattern(pattern: str, key: str = "evaluation.answer_pattern") -> re.Pattern[str]:
    """The compiled pattern. Raises UserError naming the key for an invalid one. Call it before a run starts."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: got {pattern!r}, expected a regular expression: {error}") from error
