"""CUDA IPC handles as plain values, so that they can be sent to an engine without pickling.

torch describes a shared tensor by the arguments of ``rebuild_cuda_tensor``: numbers, bytes, a data type, and two
classes that are always the same. vLLM pickles those, and only if VLLM_ALLOW_INSECURE_SERIALIZATION is set. Does not
depend on learner or engine.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from torch.storage import TypedStorage

_NAMES = tuple(inspect.signature(rebuild_cuda_tensor).parameters)
_CLASSES = {"tensor_cls": torch.Tensor, "storage_cls": TypedStorage}


def plain_handles(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's update with each tensor's handles (by GPU UUID) as plain values. Without handles it is copied as it is.

    Raises TypeError for a tensor class or a storage class that is not torch's own.
    """
    if (handles := update_info.get("ipc_handles")) is None:
        return dict(update_info)
    plain = [{gpu: _to_plain(arguments) for gpu, arguments in by_gpu.items()} for by_gpu in handles]
    return {**update_info, "ipc_handles": plain}


def rebuilt_handles(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: each handle as the arguments of ``rebuild_cuda_tensor``."""
    plain = update_info["ipc_handles"]
    return {**update_info, "ipc_handles": [{gpu: _from_plain(it) for gpu, it in by_gpu.items()} for by_gpu in plain]}


def _to_plain(arguments: tuple[Any, ...]) -> dict[str, Any]:
    named = dict(zip(_NAMES, arguments, strict=True))
    for name, expected in _CLASSES.items():
        if named[name] is not expected:
            raise TypeError(f"an IPC handle's {name} must be {expected.__name__}, got {named[name]!r}")
        del named[name]
    return {
        **named,
        "tensor_size": list(named["tensor_size"]),
        "tensor_stride": list(named["tensor_stride"]),
        "dtype": str(named["dtype"]).removeprefix("torch."),
    }


def _from_plain(plain: Mapping[str, Any]) -> tuple[Any, ...]:
    named = {
        **plain,
        **_CLASSES,
        "tensor_size": torch.Size(plain["tensor_size"]),
        "tensor_stride": tuple(plain["tensor_stride"]),
        "dtype": getattr(torch, plain["dtype"]),
    }
    return tuple(named[name] for name in _NAMES)
