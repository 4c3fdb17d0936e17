"""The difference between an engine's and the learner's log-probs, and whether both changed alike. No torch.

n = positions of a text, k = length of an engine's list, N = all positions of all texts.

The log-probs of an engine in half precision are never equal to the learner's. Rounding changes each of them, by 0.1
nats and more in a large vocabulary, which may be far more than the change from a training step. But rounding changes
them in the same way before and after a sync. So the probe texts are scored before and after it, and the engine's change
is compared with the learner's,

    change of the engine = share * change of the learner + noise

by least squares over all log-probs. The share is 1 for an engine that loaded the weights and 0 for one that did not,
however small the step. Its standard error shows whether it can be distinguished from the noise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.sequence import Floats, Ids, TopLogprobs

Doubles = npt.NDArray[np.float64]

MIDDLE = 0.5
"""An engine with a smaller share is closer to the old weights than to the new ones."""
STANDARD_ERRORS = 4.0
"""Number of standard errors between a share and the middle from which on the share is conclusive."""
MIN_POSITIONS = 16
"""With fewer positions, a standard error is meaningless."""
_EXACT = 1e-6
"""Smaller standard errors are treated as this one."""
_MAX_CONDITION = 1e8  # of the normal equations; above it, two causes can't be separated


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeNoise:
    """Difference between an engine and the learner when both are known to hold the same weights."""

    rms: float  # nats
    p99: float  # nats, absolute; 99% of the differences are below


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Differences between engine and learner, and where the largest one is."""

    rms: float  # nats
    p99: float  # nats, absolute; 99% of the differences are below
    max_difference: float  # nats, absolute; inf if the engine's row is unknown
    text_index: int
    position: int  # position of the token in its text
    token_id: int
    engine_logprob: float  # nats
    learner_logprob: float  # nats
    num_compared: int  # number of log-probs in all texts
    followed: float | None = None  # share of the learner's change that the engine shows; None if it is unknown
    followed_output_layer: float | None = None  # the same for the change from the output layer alone

    def __str__(self) -> str:
        return (
            f"rms {self.rms:.3g}, 99% within {self.p99:.3g}, at most {self.max_difference:.3g} nats (token "
            f"{self.token_id} at position {self.position} of probe text {self.text_index}: engine "
            f"{self.engine_logprob:.4f}, learner {self.learner_logprob:.4f})"
        )

    @property
    def noise(self) -> ProbeNoise:
        """The noise, if the engine is known to hold the learner's weights."""
        return ProbeNoise(rms=self.rms, p99=self.p99)


def compare_probe(engine_rows: Sequence[TopLogprobs], learner_logprobs: Sequence[Floats]) -> ProbeReport:
    """The differences over all texts. Both arguments hold one [n, k] array per text, for the engine's ids."""
    assert engine_rows, "a probe needs at least one text"
    for rows, logprobs in zip(engine_rows, learner_logprobs, strict=True):
        assert rows.logprobs.shape == logprobs.shape, (rows.logprobs.shape, logprobs.shape)
    differences = [
        np.abs(rows.logprobs - logprobs) for rows, logprobs in zip(engine_rows, learner_logprobs, strict=True)
    ]
    # An unknown value counts as different.
    differences = [np.where(np.isnan(each), np.inf, each) for each in differences]
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
    """[n, k] nats: the log-prob of these ids in each row; NaN for an id that the row does not list."""
    order = np.argsort(rows.token_ids, axis=1)
    sorted_ids = np.take_along_axis(rows.token_ids, order, axis=1).astype(np.int64)
    sorted_logprobs = np.take_along_axis(rows.logprobs, order, axis=1)
    # One search for all rows: an offset moves each row's ids into a range of their own.
    apart = (np.arange(len(rows), dtype=np.int64) << 32)[:, None]
    places = np.searchsorted((sorted_ids + apart).ravel(), (token_ids_nk + apart).ravel())
    places = places.clip(max=max(sorted_ids.size - 1, 0)).reshape(token_ids_nk.shape)
    found = (sorted_ids + apart).ravel()[places] == token_ids_nk + apart
    return np.where(found, sorted_logprobs.ravel()[places], np.float32(np.nan)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- what a sync changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Changes at a sync for the same positions and ids, [N, k] nats each. NaN for ids that the engine did not list."""

    engine: Doubles
    learner: Doubles
    output_layer: Doubles  # the output layer's part of the learner's change, up to a constant per position
    noise: Doubles  # of one scoring pass of the engine

    def contrasts(self) -> "Change":
        """The changes minus each position's mean. This removes what moves a whole position, such as the rounding of its
        normalizer, so that log-probs and logits give the same contrasts.
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
    """The part of a change that the engine followed."""

    value: float
    standard_error: float

    @property
    def is_known(self) -> bool:
        """Whether the share is clearly on one side of the middle."""
        return abs(self.value - MIDDLE) > STANDARD_ERRORS * self.standard_error

    @property
    def is_stale(self) -> bool:
        return self.is_known and self.value < MIDDLE

    @staticmethod
    def pooled(shares: Sequence["Share | None"]) -> "Share | None":
        """The mean of independent estimates, each weighted by the inverse of its variance; None if there are none."""
        known = [share for share in shares if share is not None]
        if not known:
            return None
        weights = np.array([1.0 / max(share.standard_error, _EXACT) ** 2 for share in known])
        value = float(weights @ [share.value for share in known] / weights.sum())
        return Share(value=value, standard_error=float(weights.sum() ** -0.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """How an engine followed the learner. A share is None if there are too few data to estimate it."""

    everything: Share | None
    output_layer: Share | None
    rest: Share | None  # all layers except the output layer

    def or_where_unknown(self, other: "Followed") -> "Followed":
        """Each share of this object, or the other's if this one is not conclusive."""
        return Followed(
            everything=_first_known(self.everything, other.everything),
            output_layer=_first_known(self.output_layer, other.output_layer),
            rest=_first_known(self.rest, other.rest),
        )

    @staticmethod
    def pooled(syncs: Sequence["Followed"]) -> "Followed":
        """The shares over several syncs. A part that is not sent is missing in each of them, and a single step may
        change it too little to be conclusive.
        """
        return Followed(
            everything=Share.pooled([it.everything for it in syncs]),
            output_layer=Share.pooled([it.output_layer for it in syncs]),
            rest=Share.pooled([it.rest for it in syncs]),
        )


def _first_known(share: Share | None, other: Share | None) -> Share | None:
    return share if share is not None and share.is_known else other


def followed(change: Change) -> Followed:
    """The engine's shares of the learner's change: of the whole change, and of its two parts separately."""
    everything = _least_squares(change.engine, [change.learner], noise_rms=rms_of(change.noise))
    apart = change.contrasts()
    causes = [apart.output_layer, apart.learner - apart.output_layer]
    parts = _least_squares(apart.engine, causes, noise_rms=rms_of(apart.noise))
    return Followed(
        everything=None if everything is None else everything[0],
        output_layer=None if parts is None else parts[0],
        rest=None if parts is None else parts[1],
    )


def share_of(engine: Doubles, effect: Doubles) -> Share | None:
    """[N, k] nats each: the share of one effect in the engine's values; NaN where these are unknown."""
    shares = _least_squares(engine, [effect], noise_rms=0.0)
    return None if shares is None else shares[0]


def _least_squares(change: Doubles, causes: list[Doubles], *, noise_rms: float) -> list[Share] | None:
    """The share of each cause. None if the causes can't be separated from each other or from 0.

    Differences at the same position are correlated, those at two positions hardly. So the standard errors are those of
    clustered data, with one cluster per position (Liang and Zeger, 1986). Their lower limit is the noise of two scoring
    passes of the engine; an engine that did not change at all would otherwise have a standard error of 0.
    """
    known_Nk = ~np.isnan(change)
    num_positions = int(known_Nk.any(axis=1).sum())
    causes_pNk = np.stack([np.where(known_Nk, cause, 0.0) for cause in causes])
    engine_Nk = np.where(known_Nk, change, 0.0)
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
    least_pp = 2.0 * noise_rms**2 * inverse_pp
    errors_p = np.sqrt(np.maximum(np.diag(clustered_pp), np.diag(least_pp)))
    return [Share(value=float(v), standard_error=float(e)) for v, e in zip(shares_p, errors_p, strict=True)]


def together(of_texts: Iterable[Floats]) -> Doubles:
    """[N, k] The positions of all texts."""
    return np.concatenate(list(of_texts)).astype(np.float64)


def rms_of(values: Doubles) -> float:
    """Root mean square of the known values; 0 if there are none."""
    known = values[~np.isnan(values)]
    return float(np.sqrt(np.mean(known**2))) if known.size else 0.0
