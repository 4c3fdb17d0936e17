"""Reading streams in tests: an engine's pieces, a pool's sequences."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from common.sequence import MixedSequence, Prompt
from rollout_server.controller import SwitchingController
from rollout_server.engines.protocol import Engine, GoOn, WriteRequest, Written, next_piece
from rollout_server.pool import generate_all


async def pieces_of(engine: Engine, request: WriteRequest, turns: Sequence[int]) -> list[Written]:
    """What an engine hands over for a request that pauses after so many tokens, and so many more, and then no more."""
    lengths, pieces = iter(turns), []
    request = replace(request, pause_after=next(lengths, None))
    async with aclosing(engine.stream(request)) as stream:
        go_on = None
        while (piece := await next_piece(stream, go_on)) is not None:
            pieces.append(piece)
            go_on = GoOn(num_tokens=next(lengths, None))
    return pieces


async def sequences_of(
    controller: SwitchingController, prompts: Sequence[Prompt], *, max_in_flight: int = 256
) -> list[MixedSequence]:
    """All prompts' sequences, in the order they finished."""
    async with aclosing(generate_all(controller, prompts, max_in_flight=max_in_flight)) as batches:
        return [sequence async for finished in batches for sequence in finished]
