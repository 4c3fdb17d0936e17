"""How far an engine's log-probs are from the learner's, and whether they moved as the learner's did. Pure, no torch.

n = positions of a text, k = length of an engine's list, N = all positions of all texts.

An engine in half precision is never at the learner's log-probs: rounding moves every one of them, by 0.1 nats and more
in a large vocabulary, which may be far more than a step of training does. But it moves them alike before and after a
sync. So the probe texts are read on both sides of one, and the engine's change is held against the learner's,

    change of the engine = share * change of the learner + noise

by least squares over all log-probs. The share is 1 for an engine that took the weights and 0 for one that did not,
however small the step, and its standard error says whether that can be told from the noise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.sequence import Floats, Ids, TopLogprobs

Doubles = npt.NDArray[np.float64]

MIDDLE = 0.5
"""An engine whose share is below is nearer to the old weights than to the new ones."""
STANDARD_ERRORS = 4.0
"""By which a share must be on one side of the middle to count as there."""
MIN_POSITIONS = 16
"""Of fewer positions a standard error says nothing."""
_EXACT = 1e-6
"""The least standard error that is told apart from none."""
_MAX_CONDITION = 1e8  # of the normal equations, beyond which two causes are one


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeNoise:
    """What an engine and the learner differ by where both are known to hold the same weights."""

    rms: float  # nats
    p99: float  # nats, absolute; 99% of the differences are below


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Differences between engine and learner, and where they are largest."""

    rms: float  # nats
    p99: float  # nats, absolute; 99% of the differences are below
    max_difference: float  # nats, absolute; inf where the engine's row is not known
    text_index: int
    position: int  # of the token in its text
    token_id: int
    engine_logprob: float  # nats
    learner_logprob: float  # nats
    num_compared: int  # log-probs in all texts
    followed: float | None = None  # share of the learner's change that the engine made; None where it can't be told
    followed_output_layer: float | None = None  # the same of what the output layer alone changed

    def __str__(self) -> str:
        return (
            f"rms {self.rms:.3g}, 99% within {self.p99:.3g}, at most {self.max_difference:.3g} nats (token "
            f"{self.token_id} at position {self.position} of probe text {self.text_index}: engine "
            f"{self.engine_logprob:.4f}, learner {self.learner_logprob:.4f})"
        )

    @property
    def noise(self) -> ProbeNoise:
        """As of an engine that is known to hold the learner's weights."""
        return ProbeNoise(rms=self.rms, p99=self.p99)


def compare_probe(engine_rows: Sequence[TopLogprobs], learner_logprobs: Sequence[Floats]) -> ProbeReport:
    """The differences over all texts. Both hold one [n, k] array per text, for the engine's ids."""
    assert engine_rows, "a probe needs at least one text"
    for rows, logprobs in zip(engine_rows, learner_logprobs, strict=True):
        assert rows.logprobs.shape == logprobs.shape, (rows.logprobs.shape, logprobs.shape)
    differences = [
        np.abs(rows.logprobs - logprobs) for rows, logprobs in zip(engine_rows, learner_logprobs, strict=True)
    ]
    differences = [np.where(np.isnan(each), np.inf, each) for each in differences]  # unknown is not equal
    together = np.concatenate([each.ravel() for each in differences]).astype(np.float64)
    text_index = int(np.argmax([each.max() for each in differences]))
    rows, worst = engine_rows[text_index], differences[text_index]
    row, rank = np.unravel_index(worst.argmax(), worst.shape)
    return ProbeReport(
        rms=float(np.sqrt(np.mean(together**2))),
        p99=float(np.quantile(together, 0.99, method="higher")),
        max_difference=float(worst[row, rank]),
        text_index=text_index,
        position=int(row) + 1,
        token_id=int(rows.token_ids[row, rank]),
        engine_logprob=float(rows.logprobs[row, rank]),
        learner_logprob=float(learner_logprobs[text_index][row, rank]),
        num_compared=together.size,
    )


def logprobs_of(rows: TopLogprobs, token_ids_nk: Ids) -> Floats:
    """[n, k] nats: what each row says of these ids; NaN where it does not list one."""
    order = np.argsort(rows.token_ids, axis=1)
    sorted_ids = np.take_along_axis(rows.token_ids, order, axis=1).astype(np.int64)
    sorted_logprobs = np.take_along_axis(rows.logprobs, order, axis=1)
    # Row by row in one search: each row's ids are moved into a range of their own.
    apart = (np.arange(len(rows), dtype=np.int64) << 32)[:, None]
    places = np.searchsorted((sorted_ids + apart).ravel(), (token_ids_nk + apart).ravel())
    places = places.clip(max=max(sorted_ids.size - 1, 0)).reshape(token_ids_nk.shape)
    found = (sorted_ids + apart).ravel()[places] == token_ids_nk + apart
    return np.where(found, sorted_logprobs.ravel()[places], np.float32(np.nan)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- what a sync changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a sync changed at the same positions and ids, [N, k] nats each. NaN where the engine did not list an id."""

    engine: Doubles
    learner: Doubles
    output_layer: Doubles  # of the learner's change, what its output layer made; up to a constant a position
    noise: Doubles  # of one reading of the engine

    def contrasts(self) -> "Change":
        """Less each position's mean. What moves a whole position, such as the rounding of its normalizer, is gone, and
        log-probs are as good as logits.
        """
        known_Nk = ~np.isnan(self.engine)
        num_known_N1 = known_Nk.sum(axis=1, keepdims=True).clip(min=1)

        def contrast(values_Nk: Doubles) -> Doubles:
            means_N1 = np.where(known_Nk, values_Nk, 0.0).sum(axis=1, keepdims=True) / num_known_N1
            return np.where(known_Nk, values_Nk - means_N1, np.nan)

        return Change(
            engine=contrast(self.engine),
            learner=contrast(self.learner),
            output_layer=contrast(self.output_layer),
            noise=contrast(self.noise),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How much of a change the engine followed."""

    value: float
    standard_error: float

    @property
    def is_known(self) -> bool:
        """Whether it is clearly on one side of the middle."""
        return abs(self.value - MIDDLE) > STANDARD_ERRORS * self.standard_error

    @property
    def is_stale(self) -> bool:
        return self.is_known and self.value < MIDDLE

    @staticmethod
    def pooled(shares: Sequence["Share | None"]) -> "Share | None":
        """Of independent estimates, each by the inverse of its variance; None where there is none."""
        known = [share for share in shares if share is not None]
        if not known:
            return None
        weights = np.array([1.0 / max(share.standard_error, _EXACT) ** 2 for share in known])
        value = float(weights @ [share.value for share in known] / weights.sum())
        return Share(value=value, standard_error=float(weights.sum() ** -0.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """How an engine followed the learner. None where there is too little to tell it from."""

    everything: Share | None
    output_layer: Share | None
    rest: Share | None  # all but the output layer

    def or_where_unknown(self, other: "Followed") -> "Followed":
        """Each share of this, or of the other where this one tells nothing."""
        return Followed(
            everything=_first_known(self.everything, other.everything),
            output_layer=_first_known(self.output_layer, other.output_layer),
            rest=_first_known(self.rest, other.rest),
        )

    @staticmethod
    def pooled(syncs: Sequence["Followed"]) -> "Followed":
        """What several syncs show together: a part that is left out is left out of each, and a step may change it by
        too little to show in one.
        """
        return Followed(
            everything=Share.pooled([it.everything for it in syncs]),
            output_layer=Share.pooled([it.output_layer for it in syncs]),
            rest=Share.pooled([it.rest for it in syncs]),
        )


def _first_known(share: Share | None, other: Share | None) -> Share | None:
    return share if share is not None and share.is_known else other


def followed(change: Change) -> Followed:
    """The engine's shares of the learner's change: of all of it, and of its two parts told apart."""
    everything = _least_squares(change, [change.learner])
    contrasts = change.contrasts()
    parts = _least_squares(contrasts, [contrasts.output_layer, contrasts.learner - contrasts.output_layer])
    return Followed(
        everything=None if everything is None else everything[0],
        output_layer=None if parts is None else parts[0],
        rest=None if parts is None else parts[1],
    )


def share_of(engine: Doubles, effect: Doubles) -> Share | None:
    """[N, k] nats each: how much of one effect is in what the engine says; NaN where that is not known."""
    change = Change(engine=engine, learner=effect, output_layer=effect, noise=np.zeros_like(effect))
    shares = _least_squares(change, [effect])
    return None if shares is None else shares[0]


def _least_squares(change: Change, causes: list[Doubles]) -> list[Share] | None:
    """The share of each cause; None where they can't be told apart, or not from nothing.

    Differences within a position depend on each other, those of two positions hardly: the standard errors are those of
    clustered data, a position a cluster (Liang and Zeger, 1986). They are never taken to be smaller than the noise
    of two readings of the engine makes them: an engine that did not move at all would have none.
    """
    known_Nk = ~np.isnan(change.engine)
    num_positions = int(known_Nk.any(axis=1).sum())
    causes_pNk = np.stack([np.where(known_Nk, cause, 0.0) for cause in causes])
    engine_Nk = np.where(known_Nk, change.engine, 0.0)
    products_pp = np.einsum("pnk,qnk->pq", causes_pNk, causes_pNk)
    if (
        num_positions < MIN_POSITIONS
        or not products_pp.diagonal().all()
        or np.linalg.cond(products_pp) > _MAX_CONDITION
    ):
        return None
    inverse_pp = np.linalg.inv(products_pp)
    shares_p = inverse_pp @ np.einsum("pnk,nk->p", causes_pNk, engine_Nk)
    left_Nk = engine_Nk - np.einsum("p,pnk->nk", shares_p, causes_pNk)
    scores_pN = np.einsum("pnk,nk->pn", causes_pNk, left_Nk)
    clustered_pp = inverse_pp @ (scores_pN @ scores_pN.T) @ inverse_pp * num_positions / (num_positions - 1)
    least_pp = 2.0 * rms_of(change.noise) ** 2 * inverse_pp
    errors_p = np.sqrt(np.maximum(np.diag(clustered_pp), np.diag(least_pp)))
    return [Share(value=float(v), standard_error=float(e)) for v, e in zip(shares_p, errors_p, strict=True)]


def together(of_texts: Iterable[Floats]) -> Doubles:
    """[N, k] All texts' positions."""
    return np.concatenate(list(of_texts)).astype(np.float64)


def rms_of(values: Doubles) -> float:
    """Of those that are known; 0 where none is."""
    known = values[~np.isnan(values)]
    return float(np.sqrt(np.mean(known**2))) if known.size else 0.0
