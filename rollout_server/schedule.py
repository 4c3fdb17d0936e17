"""Where the student pauses for a verdict. Pure functions of what stands written, never of time or other sequences.

The student's lead over the verifier is what it writes between two pauses. A pause soon after a position where the
teacher is likely to take over wastes little; but each costs a call to either engine, and the teacher keeps prefixes in
whole blocks, so that what is read up to the inside of a block is read again with the rest of it. docs/decisions weighs
these by measurement.
"""

import math

_FIRST_RUN = 4.0
"""Tokens between two switches that a policy of short guidance is taken for before it has shown any."""

_ROOM = 1.5
"""Tokens between two pauses over the mean run between switches, where a sequence switches often."""


def pauses_before_one_switch(
    *, num_text_tokens: int, first_switch: int, max_tokens: int, block_tokens: int
) -> tuple[int, ...]:
    """Pauses for a policy that hands the sequence over for good, in tokens after the text; none at ``max_tokens``.

    At the first block's end beyond ``first_switch``, the first token that may be refused: judging sooner is in vain.
    From there on three eighths into each block, which is read twice at little cost, and at its end.
    """
    pauses = [-num_text_tokens % block_tokens or block_tokens]
    while pauses[0] <= first_switch:
        pauses[0] += block_tokens
    while pauses[-1] < max_tokens:
        pauses += [pauses[-1] + max(1, block_tokens * 3 // 8), pauses[-1] + block_tokens]
    return tuple(dict.fromkeys(pause for pause in pauses if pause < max_tokens))


def pauses_between_switches(*, position: int, num_switches: int, max_tokens: int, block_tokens: int) -> tuple[int, ...]:
    """Pauses for a policy that gives the sequence back, in tokens after ``position``, by how often it switched."""
    pauses, end = [], 0
    while end < max_tokens:
        mean_run = (position + end + _FIRST_RUN) / (num_switches + 1)
        end += min(block_tokens, math.ceil(_ROOM * mean_run))
        pauses.append(end)
    return tuple(pause for pause in pauses if pause < max_tokens)
