"""Shards a model over the learner's ranks (FSDP2), gathers it again, and recomputes activations.

``fully_shard`` shards the decoder and gathers each layer while it computes. The loss reads the output layer without a
forward pass of its own, so the output layer is a plain sharded tensor that the loss gathers with ``whole``. In both
cases a gradient is the sum over the ranks, each of which differentiates its own tokens' part of the loss.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.errors import UserError
from trainer.ranks import Ranks


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. If it is sharded, this is a collective, and its gradient is the sum over all ranks."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def decoder_layers(model: PreTrainedModel, key: str) -> nn.ModuleList:
    """The decoder's layers: its first module list. Raises UserError naming the key that needs them."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList):
            return module
    raise UserError(f"{key}: {type(model).__name__} has no list of layers, expected a decoder that has one")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input and recompute the rest in the backward pass.

    transformers' own option works only in training mode, which would turn dropout on.
    """
    for layer in decoder_layers(model, "trainer.activation_checkpointing"):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def shard(model: PreTrainedModel, ranks: Ranks, device: torch.device) -> None:
    """Shard the model over the ranks, in place. Rank 0 has the values; other ranks' parameters may be on ``meta``.

    A rank holds its shards and, while a parameter is scattered, that parameter whole. Rank 0 also holds the whole model
    on the CPU until the end.
    """
    assert ranks.mesh is not None
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    # Detached, because fully_shard moves the parameters themselves to the device.
    values = {name: parameter.detach() for name, parameter in model.named_parameters()} if ranks.rank == 0 else {}
    decoder = model.base_model
    for module in (*decoder_layers(model, "trainer.num_ranks"), decoder):
        # Gathered only while it computes. Between steps a rank can read only its shards.
        fully_shard(module, mesh=ranks.mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean: the loss is normalized over all ranks
        module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
    decoder_prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder), "")
    parts = {
        name: _scattered(parameter, values.pop(decoder_prefix + name, None), ranks.mesh, device)
        for name, parameter in decoder.named_parameters()
    }
    decoder.load_state_dict(parts, strict=False, assign=True)
    if tied:
        head.weight = model.get_input_embeddings().weight
    head_prefix = next(f"{name}." for name, module in model.named_modules() if module is head)
    for name, parameter in list(head.named_parameters()):
        if not isinstance(parameter, DTensor):
            setattr(head, name, _scattered(parameter, values.pop(head_prefix + name, None), ranks.mesh, device))
    left = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if left:
        raise UserError(
            f"trainer.num_ranks: {type(model).__name__} keeps {', '.join(left)} outside its decoder and output layer, "
            "expected no other parameters"
        )


def _scattered(parameter: Tensor, value: Tensor | None, mesh: DeviceMesh, device: torch.device) -> nn.Parameter:
    """This rank's shard of rank 0's value."""
    placements = parameter.placements if isinstance(parameter, DTensor) else [Shard(0)]
    if value is None:  # rank 0 sends its value; only shape and dtype matter here
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return nn.Parameter(distribute_tensor(value.to(device), mesh, placements), requires_grad=parameter.requires_grad)


def whole_weights(model: PreTrainedModel, ranks: Ranks) -> dict[str, Tensor]:
    """A checkpoint's tensors by name; names of tied tensors map to the same tensor. They are gathered one by one and
    kept on rank 0's CPU; empty on other ranks. With one rank they are the model's own.
    """
    if ranks.mesh is None:
        return dict(model.state_dict())
    gathered: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            value = whole(tensor.detach()).cpu()
            gathered[id(tensor)] = value if ranks.rank == 0 else torch.empty(0)
        weights[name] = gathered[id(tensor)]
    return weights if ranks.rank == 0 else {}


def whole_copy(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel | None:
    """The unsharded model: the model itself with one rank, else a copy on rank 0's CPU, None on other ranks."""
    if ranks.mesh is None:
        return model
    weights = whole_weights(model, ranks)
    if ranks.rank != 0:
        return None
    copy: PreTrainedModel = type(model)(model.config).eval()
    copy.load_state_dict(weights)
    return copy
