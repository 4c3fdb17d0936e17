"""The learner's ranks: how they form a group, and what they exchange. Does not depend on Ray or the model.

With one rank there is no group, and every method returns its argument. CPUs use gloo, GPUs use NCCL.
"""

import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.waiting import WaitedTooLong


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One rank of a group. Every rank calls every method, in the same order."""

    rank: int = 0
    num_ranks: int = 1
    mesh: DeviceMesh | None = None  # None with one rank

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.num_ranks, (self.rank, self.num_ranks)
        assert (self.mesh is None) == (self.num_ranks == 1), (self.mesh, self.num_ranks)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, on the CPU, bitwise the same on every rank."""
        values = values.detach().cpu().clone()
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def gather(self, names: list[str]) -> list[str]:
        """The names of all ranks, in the order of the ranks."""
        if self.mesh is None:
            return names
        of_each: list[list[str]] = [[] for _ in range(self.num_ranks)]
        dist.all_gather_object(of_each, names)
        return [name for names in of_each for name in names]


ALONE = Ranks()


def join(rank: int, num_ranks: int, address: str, device: torch.device, *, timeout_s: float) -> Ranks:
    """Join the other ranks at ``host:port``, where rank 0 listens. The time-out also applies to each collective.

    Raises WaitedTooLong if not all ranks join in time.
    """
    if num_ranks == 1:
        return ALONE
    # Objects and sums are exchanged on the CPU, gradients and weights on their own device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = _meet(rank, num_ranks, address, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise WaitedTooLong(
            f"learner rank {rank} waited {timeout_s:g} s for all {num_ranks} ranks to meet at {address}: {error}"
        ) from error
    return Ranks(rank=rank, num_ranks=num_ranks, mesh=init_device_mesh(device.type, (num_ranks,)))


def _meet(rank: int, num_ranks: int, address: str, timeout: timedelta) -> Any:  # torch does not export its type
    """The store that the ranks share. Rank 0 listens only at this address; torch's own socket uses every interface.

    If the address is loopback, gloo is restricted to it too."""
    host, _, port = address.rpartition(":")
    if ipaddress.ip_address(host).is_loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listener = socket.create_server((host, int(port))).detach() if rank == 0 else None
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), num_ranks, is_master=rank == 0, timeout=timeout, master_listen_fd=listener
    )
