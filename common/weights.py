"""The student's weight version, and what travels from the learner to the engines at a weight sync."""

from collections.abc import Mapping
from dataclasses import dataclass, field

WeightVersion = int
"""Counts the weight syncs of a run: 0 for the weights the engines loaded at start. They are sent too, where a run goes
back to its beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One update as an engine receives it.

    ``transfer_info`` is what the weight-transfer backend needs to find the tensors: the file's path for
    ``host_memory``, names, dtypes and shapes for ``nccl``. The tensors themselves never pass through here.
    """

    version: WeightVersion
    transfer_info: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.version >= 0, f"version must be >= 0, got {self.version}"
