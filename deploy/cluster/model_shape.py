"""Sizes of a model, from its ``config.json``. No weights are read or allocated.

Parameters are counted on the model itself, built on torch's ``meta`` device without memory, so the count is exact for
every model that transformers supports.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from common.config import RunConfig
from common.errors import UserError, one_line

BESIDE = "models"
"""Folder next to a configuration file for hub models' ``config.json``, as ``models/ORG/NAME/config.json``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one decoder. Tied parameters are counted once."""

    source: str  # where its config.json was read from
    num_parameters: int
    num_matrix_parameters: int  # matrices of the layers, which are quantized and which autocast copies
    num_embedding_parameters: int  # input embedding and output layer
    is_tied: bool  # the output layer shares the embedding's weights
    vocab_size: int
    hidden_size: int
    inner_size: int  # feed-forward width per token; for a mixture of experts, that of all active experts
    num_layers: int
    num_heads: int
    head_size: int
    num_kv_heads: int
    cache_width: int  # numbers in one token's keys and values in one layer, over all GPUs
    splits_cache: bool  # whether tensor parallelism divides them (latent attention does not)
    linear_sides: Mapping[str, int]  # last name of a linear layer -> sum of inputs + outputs of all layers of that name
    max_position_embeddings: int | None
    quantization: Mapping[str, Any] | None  # config.json's ``quantization_config``

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of all layers, including norms."""
        return self.num_parameters - self.num_embedding_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The sizes of both models of a run."""

    student: ModelShape
    teacher: ModelShape


def read_shapes(config: RunConfig, *, beside: Path | None = None) -> Shapes:
    """Both models' shapes. Raises UserError naming the key of a model that can't be read.

    ``beside``: the configuration file. If a hub model's config.json lies next to it (``BESIDE``), the hub is not
    accessed.
    """
    remote_code = config.engines.trust_remote_code
    student, teacher = (
        _read(name, key=f"models.{role}", beside=beside, trust_remote_code=remote_code)
        for role, name in (("student", config.models.student), ("teacher", config.models.teacher))
    )
    return Shapes(student=student, teacher=teacher)


def _read(name: str, *, key: str, beside: Path | None, trust_remote_code: bool) -> ModelShape:
    stored = None if beside is None else beside.parent / BESIDE / name
    is_stored = stored is not None and (stored / "config.json").is_file() and not Path(name).exists()
    source = os.path.relpath(stored) if is_stored and stored is not None else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        return shape_of(config, source=source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        hint = "" if Path(name).exists() else f"; without the hub, put its config.json in {BESIDE}/{name} next to FILE"
        raise UserError(f"{key}: can't read the config of {name!r}: {one_line(error)}{hint}") from error


def shape_of(config: PreTrainedConfig, *, source: str = "", trust_remote_code: bool = False) -> ModelShape:
    """The text model's shape. Raises ValueError for a config that transformers can't build a model from."""
    text = config.get_text_config()
    model = _outline(text, trust_remote_code=trust_remote_code)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_tied = bool(config.tie_word_embeddings) if head is None else head.weight is embedding
    num_embedding = embedding.numel() * (1 if is_tied else 2)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if head is None and not is_tied:
        num_parameters += embedding.numel()
    outside = {id(embedding)} | ({id(head.weight)} if head is not None else set())
    num_heads = int(text.num_attention_heads)
    num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    head_size = int(getattr(text, "head_dim", None) or text.hidden_size // num_heads)
    latent = getattr(text, "kv_lora_rank", None)
    return ModelShape(
        source=source,
        num_parameters=num_parameters,
        num_matrix_parameters=sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in outside),
        num_embedding_parameters=num_embedding,
        is_tied=is_tied,
        vocab_size=int(text.vocab_size),
        hidden_size=int(text.hidden_size),
        inner_size=_inner_size(text),
        num_layers=int(text.num_hidden_layers),
        num_heads=num_heads,
        head_size=head_size,
        num_kv_heads=num_kv_heads,
        cache_width=int(latent + text.qk_rope_head_dim) if latent else 2 * num_kv_heads * head_size,
        splits_cache=not latent,
        linear_sides=_linear_sides(model, head),
        max_position_embeddings=getattr(text, "max_position_embeddings", None),
        quantization=_as_dict(getattr(config, "quantization_config", None)),
    )


def _outline(text: PreTrainedConfig, *, trust_remote_code: bool) -> Any:
    """The model on the meta device; without its output layer if transformers has no such class."""
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(text, trust_remote_code=trust_remote_code)
        except ValueError:
            return AutoModel.from_config(text, trust_remote_code=trust_remote_code)


def _inner_size(text: PreTrainedConfig) -> int:
    dense = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    experts = getattr(text, "num_experts_per_tok", None)
    one = getattr(text, "moe_intermediate_size", None) or dense
    return max(dense, int(experts * one)) if experts else dense


def _linear_sides(model: nn.Module, head: nn.Module | None) -> dict[str, int]:
    sides: dict[str, int] = defaultdict(int)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            sides[name.rpartition(".")[2]] += module.in_features + module.out_features
    return dict(sides)


def _as_dict(quantization: Any) -> Mapping[str, Any] | None:
    if quantization is None or isinstance(quantization, dict):
        return quantization
    found: Mapping[str, Any] = quantization.to_dict()
    return found
