"""How many tokens the student generates before it waits for a verdict. Pure functions of the sequence so far and of
whether other sequences wait. They never depend on time or on other sequences' tokens, so neither does the result.

Student tokens after a switch are discarded. Each pause costs a call to either engine, and leaves the student idle if no
other sequence uses its slot. docs/decisions compares these costs.
"""

import math

_INITIAL_RUN = 4.0
"""Initial guess for the number of tokens between two switches, for policies with short guidance."""

_PAUSE_FACTOR = 1.5
"""Tokens between two pauses, as a multiple of the mean number between switches, when switches are frequent."""

_EARLY_PAUSE = 3 / 8
"""Position of the early pause, as a fraction of a block."""

_NUM_CHUNKS = 8
"""Number of chunks in which an uninterrupted text is streamed. For each chunk, vLLM's front end processes the whole
text before it again. With this many chunks, little is left to process when the student finishes."""

_SHORT_RUN, _LONG_RUN = 6.0, 9.0
"""Mean tokens between switches: token-by-token mode starts below the first value and ends at the second."""


def prefers_token_by_token(*, num_judged: int, num_switches: int, is_running: bool) -> bool:
    """Whether student and teacher should advance together, token by token.

    Then no token is discarded and none is scored twice, but each token costs the teacher a decode step. Without it,
    scoring a short proposal also recomputes the part of a block before it.
    """
    return num_switches >= 2 and _mean_run(num_judged, num_switches) < (_LONG_RUN if is_running else _SHORT_RUN)


def uninterrupted_chunk(*, max_new_tokens: int, chunk_tokens: int) -> int:
    """Tokens per chunk when no verdict can stop the student: a multiple of ``chunk_tokens``, larger for long texts."""
    return chunk_tokens * max(1, math.ceil(max_new_tokens / (_NUM_CHUNKS * chunk_tokens)))


def until_pause_before_the_switch(*, text_tokens: int, block_tokens: int, switch_is_likely: bool) -> int:
    """Number of tokens to generate before the next verdict, for a policy that switches only once.

    This is the number up to the end of the text's KV-cache block: full blocks are computed once, but a partial block is
    computed again with the rest. So when a switch is likely there is at most one early pause within a block.
    """
    num_begun = text_tokens % block_tokens
    early = round(_EARLY_PAUSE * block_tokens)
    return (early if switch_is_likely and num_begun < early else block_tokens) - num_begun


def until_pause_between_switches(*, num_judged: int, num_switches: int, block_tokens: int) -> int:
    """The same for policies with limited guidance, from the share of rejected proposals so far."""
    return min(block_tokens, math.ceil(_PAUSE_FACTOR * _mean_run(num_judged, num_switches)))


def _mean_run(num_judged: int, num_switches: int) -> float:
    """Mean proposals from one rejection to the next. Teacher tokens after the switch are not counted."""
    return (num_judged + _INITIAL_RUN) / (num_switches + 1)
