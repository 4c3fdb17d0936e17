"""What an imitated engine says and how fast: the settings, and the table its rows come from. Pure.

A text's row at position j is one of R rows, chosen by the text's first token and j alone. So student and teacher see
the same place of a text in the same row, a whole text is drawn at once, and no token costs Python.

R = rows of the table, n = positions, k = length of a top list.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.sequence import Floats, Ids, TopLogprobs

EOS_TOKEN_ID = 0
_NUM_ROWS = 8192
_SHARPNESS = 2.5  # standard deviation of the logits
_SMALL_DIFFERENCE = 0.03  # median standard deviation by which a student's logits differ: about 4e-4 nats
_SURE = 25.0  # logit of the end of a text where it ends


@dataclass(frozen=True, slots=True, kw_only=True)
class ImitatedText:
    """What is written. A teacher and the student that mostly agrees with it share everything but ``spike_rate``."""

    vocabulary_size: int = 32_768
    seed: int = 0
    end_rate: float = 0.0  # share of the positions where a text ends
    spike_rate: float | None = None  # share of the positions where a student knows nothing; None for the teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorSpeeds:
    """An accelerator that decodes and prefills in steps. For planning how many engines a controller keeps busy.

    A step over b decoding sequences and m prefilled tokens takes

        max(floor, [b > 0] * (floor + b * (1 / decode_tokens_per_s - floor / full_batch)) + m / prefill_tokens_per_s)

    so ``decode_tokens_per_s`` is reached at ``full_batch`` sequences, and a step over few is bound by reading weights.
    """

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    full_batch: int = 256  # sequences at which the decode speed is reached
    step_floor_s: float = 0.005  # the shortest step
    step_tokens: int = 8192  # prefilled and decoded in one step, at most
    block_tokens: int = 16  # prefixes are reused in whole blocks
    cache_tokens: int = 1_000_000  # held for reuse
    text: ImitatedText = ImitatedText()

    def __post_init__(self) -> None:
        full_step_s = self.full_batch / self.decode_tokens_per_s
        assert self.step_floor_s <= full_step_s, f"step_floor_s must be <= {full_step_s:.4g}, got {self.step_floor_s}"

    def step_s(self, num_decoding: int, num_prefilled: int) -> float:
        """Seconds of one step."""
        seconds = num_prefilled / self.prefill_tokens_per_s
        if num_decoding:
            per_sequence_s = 1.0 / self.decode_tokens_per_s - self.step_floor_s / self.full_batch
            seconds += self.step_floor_s + num_decoding * per_sequence_s
        return max(self.step_floor_s, seconds)


class RowTable:
    """The R rows of a text, and what is drawn from them."""

    def __init__(self, text: ImitatedText, k: int) -> None:
        self.top = _make_rows(text, k)  # [R, k]
        self._cumulative: dict[tuple[float, float], Floats] = {}  # by temperature and top_p, of which a run has two
        self._unlisted_logprob = np.float32(-np.log(text.vocabulary_size))  # nats, of a token outside a list

    def row_numbers(self, first_token_id: int, start: int, end: int) -> npt.NDArray[np.int64]:
        """[end - start] Which row each position from ``start`` to ``end`` has in a text with this first token."""
        mixed = np.arange(start, end, dtype=np.uint64) + np.uint64((first_token_id + 1) << 32)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finaliser
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(_NUM_ROWS)).astype(np.int64)

    def rows(self, numbers: npt.NDArray[np.int64]) -> TopLogprobs:
        """[n, k]"""
        return TopLogprobs(self.top.token_ids.take(numbers, axis=0), self.top.logprobs.take(numbers, axis=0))

    def draw(
        self, numbers: npt.NDArray[np.int64], *, temperature: float, top_p: float, seed: int, excluded: tuple[int, ...]
    ) -> tuple[Ids, Floats]:
        """[n] tokens and their log-probs: the best at temperature 0, else drawn from what is listed."""
        if excluded:
            return self._draw_others(numbers, excluded)
        if temperature == 0.0:
            places = np.zeros(numbers.size, np.int64)
        else:
            mass = self._cumulative_mass(temperature, top_p).take(numbers, axis=0)
            draws = np.random.default_rng(seed).random(numbers.size, np.float32)
            places = (mass <= draws[:, None]).sum(axis=1)
        return self.top.token_ids[numbers, places], self.top.logprobs[numbers, places]

    def _draw_others(self, numbers: npt.NDArray[np.int64], excluded: tuple[int, ...]) -> tuple[Ids, Floats]:
        """The best token that is not excluded, listed or not."""
        rows = self.rows(numbers)
        free = ~np.isin(rows.token_ids, excluded)
        places = free.argmax(axis=1)
        other = next(token_id for token_id in range(len(excluded) + 2) if token_id not in {EOS_TOKEN_ID, *excluded})
        listed, at = free.any(axis=1), np.arange(numbers.size)
        token_ids = np.where(listed, rows.token_ids[at, places], other).astype(np.int32)
        return token_ids, np.where(listed, rows.logprobs[at, places], self._unlisted_logprob).astype(np.float32)

    def _cumulative_mass(self, temperature: float, top_p: float) -> Floats:
        """[R, k] Share of the mass up to each place, the nucleus's last place and all after it at 1."""
        if (known := self._cumulative.get((temperature, top_p))) is not None:
            return known
        weights = np.exp(self.top.logprobs.astype(np.float64) / temperature)
        mass = weights.cumsum(axis=1) / weights.sum(axis=1, keepdims=True)
        last = np.minimum((mass < top_p).sum(axis=1), mass.shape[1] - 1)
        mass /= np.take_along_axis(mass, last[:, None], axis=1)
        mass[np.arange(mass.shape[1]) >= last[:, None]] = 1.0
        self._cumulative[temperature, top_p] = mass.astype(np.float32)
        return self._cumulative[temperature, top_p]


def _make_rows(text: ImitatedText, k: int) -> TopLogprobs:
    """[R, k] The best of 2k candidates a row. The first rows end a text, the last are a student's spikes."""
    rng = np.random.default_rng(text.seed)
    num_candidates = min(2 * k, text.vocabulary_size)
    # Distinct ids: one from each of equal slices of the vocabulary. Slice 0 holds the end of the text alone.
    edges = np.linspace(1, text.vocabulary_size, num_candidates, dtype=np.int64)
    slices = rng.integers(edges[:-1], edges[1:], (_NUM_ROWS, num_candidates - 1))
    token_ids = np.concatenate([np.full((_NUM_ROWS, 1), EOS_TOKEN_ID), slices], axis=1).astype(np.int32)
    logits = rng.normal(0.0, _SHARPNESS, token_ids.shape)
    logits[:, 0] = -_SURE
    if text.spike_rate is not None:
        spread = _SMALL_DIFFERENCE * np.exp(rng.normal(0.0, 1.0, (_NUM_ROWS, 1)))
        logits += spread * rng.normal(0.0, 1.0, token_ids.shape)
        num_spikes = round(text.spike_rate * _NUM_ROWS)
        if num_spikes:
            logits[-num_spikes:, 1:] = rng.normal(0.0, _SHARPNESS, (num_spikes, num_candidates - 1))
    logits[: round(text.end_rate * _NUM_ROWS), 0] = _SURE
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    best = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    return TopLogprobs(
        np.take_along_axis(token_ids, best, axis=1), np.take_along_axis(logprobs, best, axis=1).astype(np.float32)
    )
