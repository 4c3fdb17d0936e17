"""Take the teacher's token from a row of scores already in hand, where that gives the same distribution as asking it.

Lists are raw log-probs of the k best tokens. Greedily the best is the token. At temperature 1 without a nucleus the
listed probabilities are the true ones: a token is drawn from them by inversion, and what is left to 1 is the chance
that it lies outside the list, where only the teacher can draw. At any other setting that chance is not known.
"""

from dataclasses import replace

import numpy as np

from common.config import Sampling
from common.seeds import derive_seed
from common.sequence import TopLogprobs
from rollout_server.engines.protocol import MAX_EXCLUDED, Engine, WriteRequest, Written

_ROUNDING = 1e-6
"""A list that lacks less than this of the mass holds the whole vocabulary: float32 log-probs don't sum to 1 exactly."""


def can_draw(sampling: Sampling) -> bool:
    """Whether rows of scores suffice to draw a token under these settings."""
    return sampling.temperature == 0.0 or (sampling.temperature == 1.0 and sampling.top_p == 1.0)


def draw_place(row: TopLogprobs, *, temperature: float, seed: int) -> int | None:
    """Place in the one-row list of a token drawn from the whole distribution; None when it fell outside the list.

    Same seed, same row: same place. ``can_draw`` must hold.
    """
    assert len(row) == 1, f"expected one row, got {len(row)}"
    if temperature == 0.0:
        return 0
    mass = np.exp(row.logprobs[0].astype(np.float64)).cumsum()
    whole = mass[-1] if mass[-1] > 1.0 - _ROUNDING else 1.0
    place = int(np.searchsorted(mass, np.random.default_rng(seed).random() * whole, side="right"))
    return place if place < row.k else None


async def draw_token(row: TopLogprobs, request: WriteRequest, teacher: Engine) -> Written:
    """The teacher's next token from the row at hand, or from the teacher itself where the draw falls outside the list.

    Of a list longer than what a request can exclude only its head is drawn from. ``can_draw`` must hold. A drawn token
    has no finish reason; one that the teacher generated has.
    """
    head = row.best(MAX_EXCLUDED)
    place = draw_place(head, temperature=request.temperature, seed=request.seed)
    if place is None:
        listed = tuple(head.token_ids[0].tolist())
        # Another seed: that the first one fell outside the list is correlated with what it would draw there.
        seed = derive_seed(request.seed, "unlisted")
        return await teacher.generate(replace(request, excluded_token_ids=listed, seed=seed))
    return Written(
        token_ids=row.token_ids[0, place : place + 1],
        logprobs=row.logprobs[0, place : place + 1],
        top=row,
        weight_version=0,
        finish_reason=None,
    )
