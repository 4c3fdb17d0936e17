"""How much work a set of mixed sequences is, and how long it must take at least. Pure.

Bounds and cost model compare with the same tokens: as many by the student, as many read and written by the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.config import Sampling
from common.seeds import derive_seed
from common.sequence import MixedSequence, TokenSource
from rollout_server.engines.protocol import ScoreRequest, WriteRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """The work of some sequences as offline batches."""

    student_writes: list[WriteRequest]
    teacher_prompts: list[ScoreRequest]  # bare prompts, so that the reads need no rows of theirs
    teacher_reads: list[ScoreRequest]  # prompt and the student's tokens, with log-probs after the prompt
    teacher_plain_reads: list[ScoreRequest]  # both with log-probs everywhere, as one request a sequence would do it
    teacher_writes: list[WriteRequest]


def offline_batches(sequences: Sequence[MixedSequence], sampling: Sampling) -> Batches:
    """A sequence that the teacher interrupts counts as one that the student begins and the teacher ends."""
    batches = Batches(
        student_writes=[],
        teacher_prompts=[],
        teacher_reads=[],
        teacher_plain_reads=[],
        teacher_writes=[],
    )
    for sequence in sorted(sequences, key=lambda sequence: sequence.sequence_id):
        prompt, num_guided = sequence.prompt.token_ids, sequence.num_teacher_tokens
        num_explored = len(sequence) - num_guided
        text = np.concatenate([prompt, sequence.token_ids[:num_explored]])
        batches.teacher_prompts.append(_read(sequence, prompt, start=prompt.size))
        if num_explored:
            batches.student_writes.append(_write(prompt, num_explored, sequence, sampling))
            # The last token of a whole text is read by nobody.
            readable = text if num_guided else text[:-1]
            if readable.size > prompt.size:
                batches.teacher_reads.append(_read(sequence, readable, start=prompt.size + 1))
            batches.teacher_plain_reads.append(_read(sequence, readable, start=1))
        else:
            batches.teacher_plain_reads.append(batches.teacher_prompts[-1])
        if num_guided:
            batches.teacher_writes.append(_write(text, num_guided, sequence, sampling))
    return batches


def _read(sequence: MixedSequence, text: np.ndarray, *, start: int) -> ScoreRequest:
    return ScoreRequest(token_ids=text, start=start, sequence_id=sequence.sequence_id)


def _write(prefix: np.ndarray, num_tokens: int, sequence: MixedSequence, sampling: Sampling) -> WriteRequest:
    return WriteRequest(
        prefix=prefix,
        max_tokens=num_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=derive_seed(sequence.prompt.seed, "offline", num_tokens),
        chunk_tokens=num_tokens,
        sequence_id=sequence.sequence_id,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineTimes:
    """Seconds of each offline batch, alone on the machine. The bounds take the teacher's reading as one batch."""

    student_s: float
    teacher_prompt_s: float  # the bare prompts
    teacher_read_s: float  # what the student wrote, the prompts being cached
    teacher_plain_read_s: float  # both in one, with log-probs everywhere
    teacher_write_s: float  # what was read being cached
    teacher_spread_write_s: float  # the same, as few at a time as the rollouts had on average

    @property
    def teacher_s(self) -> float:
        return self.teacher_plain_read_s + self.teacher_write_s

    @property
    def split_teacher_s(self) -> float:
        """With the prompts read first, without log-probs, as the rollouts do."""
        return self.teacher_prompt_s + self.teacher_read_s + self.teacher_write_s

    @property
    def serial_s(self) -> float:
        return self.student_s + self.teacher_s

    @property
    def parallel_s(self) -> float:
        """The busier engine's share."""
        return max(self.student_s, self.teacher_s)

    @property
    def predicted_s(self) -> float:
        """The cost model: the busier engine's share where the teacher writes all along.

        A step that decodes half as many sequences takes more than half the time: the teacher's writing costs the more,
        the smaller its share of the tokens is.
        """
        return max(self.student_s, self.teacher_prompt_s + self.teacher_read_s + self.teacher_spread_write_s)

    @property
    def split_serial_s(self) -> float:
        return self.student_s + self.split_teacher_s

    @property
    def split_parallel_s(self) -> float:
        return max(self.student_s, self.split_teacher_s)


def most_tokens_to_compute(batches: Batches, block_tokens: int) -> int:
    """Prompt tokens that the teacher computes for prompts, reads and writes in turn, if each finds what was read before
    it in the cache, but for the block that it ends in and the last token, which is always computed.
    """

    def ends(requests: Sequence[ScoreRequest]) -> dict[str, int]:
        return {str(request.sequence_id): request.token_ids.size for request in requests}

    read = ends(batches.teacher_prompts)
    num_tokens = sum(read.values())
    for request in batches.teacher_reads:
        num_tokens += request.token_ids.size - read[str(request.sequence_id)] + block_tokens
    read |= ends(batches.teacher_reads)
    for write in batches.teacher_writes:
        num_tokens += write.prefix.size - read[str(write.sequence_id)] + block_tokens
    return num_tokens


def num_tokens_teacher_must_read(sequence: MixedSequence) -> int:
    """Prompt and all tokens but the last, less those that the teacher's own writing left in its cache.

    Of a guided run, the last token is not in the cache yet when the run ends.
    """
    is_guided = sequence.sources == TokenSource.TEACHER
    num_runs = int(is_guided[:1].sum() + (np.diff(is_guided.astype(np.int8)) == 1).sum())
    num_left_in_cache = int(is_guided.sum()) - num_runs
    return int(sequence.prompt.token_ids.size) + len(sequence) - 1 - num_left_in_cache
