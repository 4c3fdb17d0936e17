"""How far the student runs before a verdict. Pure functions of what stands written and of how many sequences there are,
never of time or of what others wrote, so that a sequence's record does not depend on arrival.

What the student writes past a switch is dropped. Each pause costs a call to either engine, and an idle student where no
other sequence takes its place. docs/decisions weighs them.
"""

import math
from dataclasses import dataclass

_FIRST_RUN = 4.0
"""Tokens between two switches that a policy of short guidance is taken for before it has shown any."""

_ROOM = 1.5
"""Tokens between two pauses over the mean run between switches, where a sequence switches often."""

_EARLY = 3 / 8
"""How far into a block its early pause is."""

_SHORT_RUN, _LONG_RUN = 6.0, 9.0
"""Mean runs between switches below which both engines go token by token, and from which they no longer do."""


@dataclass(frozen=True, slots=True)
class Pauses:
    """Where the student waits, in tokens after the text it goes on from."""

    after: tuple[int, ...] = ()  # ascending
    early: frozenset[int] = frozenset()  # those of them that are worth a verdict only where a switch is near


def goes_in_step(*, position: int, num_switches: int, is_in_step: bool) -> bool:
    """Whether student and teacher had better go over the text together, token by token.

    Then nothing is written in vain and nothing read twice, at the price of a decode step of the teacher for each token;
    reading a short run costs it the part of a block before it too.
    """
    return num_switches >= 2 and _mean_run(position, num_switches) < (_LONG_RUN if is_in_step else _SHORT_RUN)


def pauses_before_the_switch(*, text_tokens: int, max_tokens: int, block_tokens: int) -> Pauses:
    """Pauses for a policy that hands over once and for all, after a text of ``text_tokens``.

    At the ends of the text's whole blocks: what is read up to there is read once, but a part of a block is read again
    with the rest. So an early pause is one within a block.
    """
    ends = range(block_tokens - text_tokens % block_tokens, max_tokens, block_tokens)
    early = max(1, round(_EARLY * block_tokens))
    within = frozenset(end + early for end in ends if early < block_tokens and end + early < max_tokens)
    return Pauses(tuple(sorted({*ends, *within})), within)


def pauses_between_switches(*, position: int, num_switches: int, max_tokens: int, block_tokens: int) -> Pauses:
    """Pauses for a policy that gives the sequence back, after ``position``, by how often it switched."""
    pauses, end = [], 0
    while end < max_tokens:
        end += min(block_tokens, math.ceil(_ROOM * _mean_run(position + end, num_switches)))
        pauses.append(end)
    return Pauses(tuple(pause for pause in pauses if pause < max_tokens))


def _mean_run(position: int, num_switches: int) -> float:
    return (position + _FIRST_RUN) / (num_switches + 1)
