"""Weights as files in shared memory: a folder that is removed with its process, and a safetensors writer.

Does not depend on engines or vLLM.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Meta(Protocol):
    """Name, dtype and shape of one tensor."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """Tensors, with their metadata first and then yielded in that order, such as vLLM's ``WeightSource``."""

    def metadata(self) -> Sequence[Meta]: ...
    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class WeightFolder:
    """A new folder in shared memory. It is removed by ``remove`` or when this process exits normally.

    Its lock is held while this process lives, so that a later process can find and remove the folder of a killed one.
    """

    PREFIX = "adaswitch-weights-"

    def __init__(self, parent: Path) -> None:
        self._remove_left_behind(parent)
        self.path = Path(tempfile.mkdtemp(prefix=self.PREFIX, dir=parent))
        lock_fd = os.open(self.path / "lock.new", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        (self.path / "lock.new").rename(self.path / "lock")  # after locking, so that others never see it unlocked
        self.remove = weakref.finalize(self, self._remove, self.path, lock_fd)

    @staticmethod
    def _remove(path: Path, lock_fd: int) -> None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock_fd)

    @classmethod
    def _remove_left_behind(cls, parent: Path) -> None:
        for lock in parent.glob(f"{cls.PREFIX}*/lock"):
            with suppress(OSError):  # still in use, another user's, or just removed
                lock_fd = os.open(lock, os.O_RDWR)
                try:
                    fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.parent)
                finally:
                    os.close(lock_fd)


def write_safetensors(path: Path, source: Source) -> None:
    """Write all tensors of a source, one at a time. The file appears atomically.

    safetensors' own writer needs all tensors in memory at once and refuses tied ones; this needs memory for one tensor.
    Raises OSError if the folder's file system has no space for the file.
    """
    metadata = source.metadata()
    header_json = _safetensors_header(metadata)
    num_bytes = 8 + len(header_json) + sum(map(_num_bytes, metadata))
    free_bytes = shutil.disk_usage(path.parent).free
    if num_bytes > free_bytes:
        raise OSError(
            errno.ENOSPC,
            f"has {free_bytes / 2**20:.0f} MiB free, the weights need {num_bytes / 2**20:.0f} MiB: give the container "
            "more shared memory (docker: --shm-size), or use sync.backend = nccl",
            str(path.parent),
        )
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(header_json).to_bytes(8, "little") + header_json)
            for declared, (name, tensor) in zip(metadata, source, strict=True):
                sent = (name, tensor.dtype, tuple(tensor.shape))
                assert sent == (declared.name, declared.dtype, declared.shape), f"declared {declared}, got {sent}"
                file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _num_bytes(tensor: Meta) -> int:
    return int(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize)


def _safetensors_header(metadata: Sequence[Meta]) -> bytes:
    """https://github.com/huggingface/safetensors#format: names, dtypes, shapes and offsets, padded to 8 bytes."""
    header: dict[str, object] = {}
    end = 0
    for tensor in metadata:
        begin, end = end, end + _num_bytes(tensor)
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    header_json = json.dumps(header).encode()
    return header_json + b" " * (-len(header_json) % 8)
