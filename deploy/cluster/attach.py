"""Live runs for the inspector: finds rollout actors by name on a Ray cluster. Implements ``LiveRollouts``.

A training run gives its rollout actor a name that contains the run's name (``live_name``). Every process on the cluster
can look it up while the run lasts. If several runs have the same name, that name alone is ambiguous.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import list_named_actors

from common.errors import UserError, one_line
from common.waiting import WaitedTooLong, within
from rollout_server.inspector.live import LiveRollouts, RunNotLive, SeveralRunsLive
from rollout_server.inspector.live_records import LiveFailure, LivePiece, LiveRefusal, LiveRequest

NAMESPACE = "adaswitch"
_PREFIX = "rollouts/"
_LIST_TIMEOUT_S = 10.0


def live_name(run: str) -> str:
    """A unique name for a run's rollout actor: the run's name with a random suffix."""
    return f"{_PREFIX}{run}/{uuid4().hex[:8]}"


def attach(address: str) -> LiveRollouts:
    """Connect to a running Ray cluster; ``auto`` is the one on this machine. Raises UserError if there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"--attach {address}: can't connect to a Ray cluster there ({reason})") from error
    return AttachedRollouts()


class AttachedRollouts:
    """The live runs of the connected cluster."""

    def __init__(self, *, piece_timeout_s: float = 120.0) -> None:
        self._piece_timeout_s = piece_timeout_s

    async def runs(self) -> list[str]:
        """The names of the live runs, sorted, one entry per run."""
        return sorted(run for run, _ in await self._actors())

    async def generate(self, run: str | None, request: LiveRequest) -> AsyncGenerator[LivePiece, None]:
        """See the protocol. Closing it cancels the requests in the run's engines."""
        handle = await self._handle(run)
        references = handle.write_live.options(num_returns="streaming").remote(request)
        try:
            while True:
                reference = await within(self._piece_timeout_s, anext(references), "the next tokens of a live run")
                yield await within(self._piece_timeout_s, reference, "tokens of a live run")
        except StopAsyncIteration:
            return
        except RayTaskError as error:
            if isinstance(error.cause, LiveRefusal | LiveFailure):
                raise error.cause from None
            raise LiveFailure(f"the run failed: {one_line(error.cause)}") from error
        except (RayActorError, WaitedTooLong) as error:
            raise LiveFailure(one_line(error)) from error
        finally:
            # Don't cancel nested calls: one exchange with an engine serves all streams, including the training's.
            with suppress(RayError):
                ray.cancel(references, recursive=False)

    async def _handle(self, run: str | None) -> Any:
        found = await self._actors()
        wanted = [name for name_of_run, name in found if run in (None, name_of_run)]
        if not wanted:
            raise RunNotLive(sorted(name_of_run for name_of_run, _ in found))
        if len(wanted) > 1:
            raise SeveralRunsLive(sorted(name_of_run for name_of_run, _ in found))
        try:
            return ray.get_actor(wanted[0], namespace=NAMESPACE)
        except ValueError as error:  # it has just ended
            raise RunNotLive([]) from error

    async def _actors(self) -> list[tuple[str, str]]:
        """(run, actor name) of every named rollout actor."""
        listed = await within(
            _LIST_TIMEOUT_S, asyncio.to_thread(list_named_actors, all_namespaces=True), "the cluster's list of actors"
        )
        names = [actor["name"] for actor in listed if actor["namespace"] == NAMESPACE]
        return [(name.removeprefix(_PREFIX).rpartition("/")[0], name) for name in names if name.startswith(_PREFIX)]
