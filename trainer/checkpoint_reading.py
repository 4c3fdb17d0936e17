"""Reads files of ``torch.distributed.checkpoint`` without running code from them.

torch pickles its index, ``.metadata``, and every value that is not a tensor, and unpickles them without restrictions,
so a folder that somebody else can write to could run code. Here the index may only use the classes named below, and
other values are read by torch's weights-only reader. torch already reads tensors that way.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_INDEX_CLASSES = {
    "pathlib": {"PosixPath"},
    "torch": {"Size"},  # and dtypes
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""All classes in an index of torch 2.13, by module: sizes, data types, layouts and where each tensor is stored."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, name: str) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _INDEX_CLASSES.get(module_name, ()):
            raise pickle.UnpicklingError(f"its index contains {module_name}.{name}, which our checkpoints don't use")
        return super().find_class(module_name, name)


class CheckpointReader(FileSystemReader):
    """Reads a folder's tensors and their index. Raises UnpicklingError if the index contains anything else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self._get_metadata_path(kwargs.get("rank"))).open("rb") as file:
            metadata: Metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckpointPlanner(DefaultLoadPlanner):
    """Reads values other than tensors: numbers, text, lists and dicts. Raises UnpicklingError for anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))
