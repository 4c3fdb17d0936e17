"""How far the student runs before a verdict. Pure functions of what stands written and of how many sequences there are,
never of time or of what others wrote, so that a sequence's record does not depend on arrival.

What the student writes past a switch is dropped. Each pause costs a call to either engine, and an idle student where no
other sequence takes its place. docs/decisions weighs them.
"""

import math

_FIRST_RUN = 4.0
"""Tokens between two switches that a policy of short guidance is taken for before it has shown any."""

_ROOM = 1.5
"""Tokens between two pauses over the mean run between switches, where a sequence switches often."""

_EARLY = 3 / 8
"""How far into a block its early pause is."""

_READS = 8
"""Pieces in which a text is read that nobody interrupts. Each read costs vLLM's front end the whole text before it too;
this many leave little to be read when the student has ended."""

_SHORT_RUN, _LONG_RUN = 6.0, 9.0
"""Mean runs between switches below which both engines go token by token, and from which they no longer do."""


def goes_in_step(*, num_judged: int, num_switches: int, is_in_step: bool) -> bool:
    """Whether student and teacher had better go over the text together, token by token.

    Then nothing is written in vain and nothing read twice, at the price of a decode step of the teacher for each token;
    reading a short run costs it the part of a block before it too.
    """
    return num_switches >= 2 and _mean_run(num_judged, num_switches) < (_LONG_RUN if is_in_step else _SHORT_RUN)


def uninterrupted_chunk(*, max_new_tokens: int, chunk_tokens: int) -> int:
    """Tokens to hand over at a time where no verdict can stop the student: whole chunks, more the longer texts get."""
    return chunk_tokens * max(1, math.ceil(max_new_tokens / (_READS * chunk_tokens)))


def until_pause_before_the_switch(*, text_tokens: int, block_tokens: int, is_near: bool) -> int:
    """Tokens to write before the next verdict after a text of ``text_tokens``, for a policy that hands over once and
    for all.

    To the end of the text's block: what is read up to there is read once, but a part of a block is read again with the
    rest. So an early pause, where a switch is near, is one within a block.
    """
    num_begun = text_tokens % block_tokens
    early = round(_EARLY * block_tokens)
    return (early if is_near and num_begun < early else block_tokens) - num_begun


def until_pause_between_switches(*, num_judged: int, num_switches: int, block_tokens: int) -> int:
    """The same for a policy that gives the sequence back, by how many of the proposals judged so far were refused."""
    return min(block_tokens, math.ceil(_ROOM * _mean_run(num_judged, num_switches)))


def _mean_run(num_judged: int, num_switches: int) -> float:
    """Proposals from one refused to the next. What the teacher goes on to write tells nothing of it."""
    return (num_judged + _FIRST_RUN) / (num_switches + 1)
