"""Where the student pauses for a verdict, under policies that give the sequence back. Pure functions of what stands
written, never of time or other sequences, so that a sequence's record does not depend on arrival.

What the student writes past a switch is dropped, and such policies switch often: let run, nearly all it writes is. Each
pause costs a call to either engine. docs/decisions weighs the two.
"""

import math

_FIRST_RUN = 4.0
"""Tokens between two switches that a policy of short guidance is taken for before it has shown any."""

_ROOM = 1.5
"""Tokens between two pauses over the mean run between switches, where a sequence switches often."""


def pauses_between_switches(*, position: int, num_switches: int, max_tokens: int, block_tokens: int) -> tuple[int, ...]:
    """Pauses for a policy that gives the sequence back, in tokens after ``position``, by how often it switched."""
    pauses, end = [], 0
    while end < max_tokens:
        mean_run = (position + end + _FIRST_RUN) / (num_switches + 1)
        end += min(block_tokens, math.ceil(_ROOM * mean_run))
        pauses.append(end)
    return tuple(pause for pause in pauses if pause < max_tokens)
