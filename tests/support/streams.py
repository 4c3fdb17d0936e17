"""Reading an engine's streams in tests."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from rollout_server.engines.protocol import Engine, GoOn, WriteRequest, Written, next_piece


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
