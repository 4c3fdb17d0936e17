"""A device that torch takes for an accelerator and that is none: ``python -m tests.trainer.pretend_device STUDENT``.

A tensor on it keeps its numbers in the CPU's memory, and an operation that mixes it with tensors of the CPU raises, as
it would on a GPU. So what runs here finds its tensors where it looks for them; whether a GPU's numbers are right is not
seen. The program takes a learner on it through what a run asks of one, and prints what became of each case as JSON. It
is a process of its own because torch knows such a device once and for all. Not a test: test_devices.py starts it.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from common.config import CrossEntropy, LoRA, Trainer
from common.sequence import MixedSequence, TopLogprobs
from tests.trainer.conftest import _make_model, _written_by
from trainer.batch import collate
from trainer.learner import Learner
from trainer.probe import ProbeLimits, SyncProbe
from trainer.probe_reading import read

NAME = "pretend"
MOVES = ("_to_copy", "copy_")  # between devices
READS = ("_local_scalar_dense",)  # give no tensor


class MixedDevices(RuntimeError):
    """An operation on tensors of two devices."""


class Backend(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class PretendTensor(Tensor):
    """A tensor on the device."""

    numbers: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "PretendTensor":
        tensor: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=f"{NAME}:0",
        )
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """While it is on, tensors can be made on the device and moved to it."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


def run(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One operation, on the numbers; its tensors are on the device if it is asked for, or if those that came in are."""
    name = operation.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [isinstance(tensor, PretendTensor) for tensor in tensors]
    strangers = [it for it, is_on in zip(tensors, on_device, strict=True) if not is_on and it.ndim > 0]
    if name not in MOVES and any(on_device) and strangers:
        raise MixedDevices(f"{operation} of tensors on {', '.join(str(tensor.device) for tensor in tensors)}")
    if (wanted := kwargs.get("device")) is not None:
        stays = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        stays = on_device[0] if name == "copy_" else any(on_device)
    answer = operation(*tree_map(numbers_of, args), **tree_map(numbers_of, kwargs))
    known = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, PretendTensor)}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not stays or name in READS:
            return leaf
        return known[id(leaf)] if id(leaf) in known else PretendTensor(leaf)  # in place: what came goes back

    return tree_map(wrapped, answer)


def numbers_of(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, PretendTensor) else leaf


# ----------------------------------------------------------------------------------------------------------- the cases

COMMON = {"learning_rate": 1e-2, "tokens_per_micro_batch": 54, "positions_per_chunk": 16, "num_threads": 1}
CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed and recomputed": {"packing": True, "activation_checkpointing": True},
    "adapter on cross-entropy": {"lora": LoRA(rank=2), "loss": CrossEntropy()},
    "bfloat16": {"dtype": "bfloat16"},
}


def walk(
    student: str, knobs: dict[str, Any], sequences: list[MixedSequence], device: torch.device, *, probed: bool
) -> list[Tensor]:
    """A step, with the probe around it if that is wanted. All numbers that come of it, on the CPU."""
    learner = Learner(student, Trainer(**{**COMMON, **knobs}), seed=0, device=device)
    texts = [sequence.token_ids for sequence in sequences[:2]]
    probe, followed = SyncProbe(learner.model), None
    if probed:
        probe.read_before(texts, [rows(learner, texts)])
    report = learner.step(sequences)
    if probed:
        followed = probe.check(texts, [rows(learner, texts)], ProbeLimits(max_difference=1e-6)).followed
    assert report.num_micro_batches > 1
    assert {parameter.device.type for parameter in learner.model.parameters()} == {device.type}
    numbers = torch.tensor([report.loss, report.grad_norm, report.covered_mass, followed or 0.0])
    return [numbers, *(tensor.cpu() for tensor in learner.model.state_dict().values())]


def rows(learner: Learner, texts: list[Any]) -> list[TopLogprobs]:
    """What an engine with the learner's weights would say."""
    ids = [text[:, None].repeat(4, axis=1) + range(4) for text in texts]
    ids = [(each % learner.model.config.vocab_size).astype("int32") for each in ids]
    logprobs = read(learner.model, texts, ids).logprobs
    return [TopLogprobs(token_ids, each) for token_ids, each in zip(ids, logprobs, strict=True)]


def leave_batch_on_the_cpu(student: str, device: torch.device) -> None:
    """A mistake that no processor notices."""
    learner = Learner(student, Trainer(**COMMON), seed=0, device=device)
    micro_batch = collate(_written_by(_make_model(seed=1)))
    learner.device = torch.device("cpu")
    learner.position_losses(micro_batch, torch.ones(len(micro_batch)))


def outcome_of(case: Callable[[], object]) -> str:
    try:
        case()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "as on the cpu"


def main(student: str) -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # gone with its name
    autocast.fallback(torch.library.fallthrough_kernel)
    device = torch.device(f"{NAME}:0")

    sequences = _written_by(_make_model(seed=1), num=4, num_student_tokens=2)

    def compare(knobs: dict[str, Any]) -> None:
        expected = walk(student, knobs, sequences, torch.device("cpu"), probed=not knobs)
        with PretendDevice():
            found = walk(student, knobs, sequences, device, probed=not knobs)
        if knobs.keys() & {"dtype", "lora"}:  # autocast passes by this device, and an adapter begins at random
            found, expected = [found[0][:1]], [expected[0][:1]]
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=0.05 if "dtype" in knobs else 1e-4, atol=1e-5)

    def mix() -> None:
        with PretendDevice():
            torch.ones(2, device=device) + torch.ones(2)

    def forget() -> None:
        with PretendDevice():
            leave_batch_on_the_cpu(student, device)

    outcomes = {name: outcome_of(lambda knobs=knobs: compare(knobs)) for name, knobs in CASES.items()}
    outcomes |= {"tensors of both": outcome_of(mix), "a batch left on the cpu": outcome_of(forget)}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
