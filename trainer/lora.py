"""Low-rank adapters on the student's linear layers (LoRA, arXiv 2106.09685), with peft, and how they are merged.

A layer's weight is frozen + scale * B @ A, and only A and B are trained. Engines and saved students get this sum under
the weight's own name, computed one weight at a time; neither ever gets an adapter. Does not depend on either.

An adapted layer is recognized by its ``lora_A``, so a run without adapters never imports peft.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config import LoRA
from common.errors import UserError

ADAPTER = "default"  # peft's name of the only adapter
KEY = "trainer.lora.target_modules"


def add_adapter(model: PreTrainedModel, config: LoRA) -> Any:
    """Add an adapter to the model, in place, and freeze the other weights. Returns peft's wrapper of the model.

    The adapter changes nothing at first: B starts at 0, A is random. Raises UserError for target modules that don't
    exist or can't have an adapter.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=_target_names(model, config.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings, adapter_name=ADAPTER).eval()


def _target_names(model: PreTrainedModel, wanted: str | tuple[str, ...]) -> list[str]:
    """Full names of the target layers. The output layer can't be one, because the loss differentiates it itself."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    inner = [name for name in linears if name != head]
    if not inner:
        raise UserError(f"{KEY}: {type(model).__name__} has no torch.nn.Linear besides its output layer")
    if isinstance(wanted, str):
        return inner
    chosen: set[str] = set()
    for target in wanted:
        matching = [name for name in linears if name == target or name.endswith(f".{target}")]
        if head in matching:
            raise UserError(f"{KEY}: got {target!r}, the output layer, which the loss computes itself; leave it out")
        if not matching:
            known = sorted({name.rpartition(".")[2] for name in inner})
            raise UserError(
                f"{KEY}: {target!r} is not a linear layer of {type(model).__name__}, expected some of {known}"
            )
        chosen.update(matching)
    return [name for name in inner if name in chosen]


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layer of each adapted weight, by the weight's name in a checkpoint. Empty without an adapter."""
    return {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """[out, in] The frozen weight + scale * B @ A, as a new tensor."""
    merged: Tensor = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
    return merged


def checkpoint_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's tensors under a checkpoint's names, without adapters. Adapted weights have their frozen values."""
    modules = {name.removesuffix(".weight") for name in adapted_layers(model)}
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, frozen, parameter = name.partition(".base_layer.")
        if frozen and module in modules:
            named[f"{module}.{parameter}"] = tensor
        elif name.partition(".lora_")[0] not in modules:
            named[name] = tensor
    return named


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with a checkpoint's names and merged adapters. Only adapted weights are copied, to the CPU."""
    layers = adapted_layers(model)
    return {
        name: merged_weight(layers[name]).cpu() if name in layers else tensor
        for name, tensor in checkpoint_names(model, weights).items()
    }


@torch.no_grad()
def parameters_for(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: values for the model's own parameters that give the same model as a checkpoint's merged weights.

    The adapter is not changed; the product that it adds is subtracted from the frozen weight.
    """
    values: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    layers = adapted_layers(model)
    for name, tensor in weights.items():
        if name in layers:
            frozen = layers[name].base_layer.weight
            old = tensor.to(dtype=frozen.dtype, device=frozen.device)
            values[name.removesuffix("weight") + "base_layer.weight"] = old - layers[name].get_delta_weight(ADAPTER)
        elif name in values:
            values[name] = tensor
        else:  # a bias of an adapted layer
            module, _, parameter = name.rpartition(".")
            values[f"{module}.base_layer.{parameter}"] = tensor
    return values
