"""Random models of given shapes, and random mixed sequences to train them on. Nothing is fetched.

T, P, k as in ``common/sequence.py``.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from common.sequence import Ids, MixedSequence, Prompt, TokenSource, TopLogprobs
from tests.gpu.machine import ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Qwen2 with a tied output layer, and how far its distributions are from uniform."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    initializer: float
    last_norm: float  # weight of the norm before the output layer: the logits grow with it

    @property
    def num_layer_parameters(self) -> int:
        """Of all layers' matrices."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def step_flops(self, lengths: Sequence[int], num_new_tokens: int) -> float:
        """Of a training step's matrix products, forward and backward: 6 for each weight and token (PaLM, arXiv
        2204.02311, appendix B), the output layer at the new tokens alone; attention's two products over what a token
        sees. Layers computed a second time for their gradient do not count.
        """
        matrices = 6.0 * self.num_layer_parameters * sum(lengths)
        output_layer = 6.0 * self.vocabulary * self.hidden * num_new_tokens
        attention = 6.0 * self.layers * self.hidden * sum(length * (length + 1) for length in lengths)
        return matrices + output_layer + attention


TINY = Shape(
    vocabulary=384,
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate=128,
    context=256,
    initializer=0.1,
    last_norm=3.0,
)
MIDDLE = Shape(
    vocabulary=2048,
    hidden=256,
    layers=4,
    heads=4,
    kv_heads=2,
    intermediate=768,
    context=2048,
    initializer=0.05,
    last_norm=4.0,
)
"""Large enough for every attention kernel (heads of 64), small enough for a processor."""
QWEN2_500M = Shape(
    vocabulary=151_936,
    hidden=896,
    layers=24,
    heads=14,
    kv_heads=2,
    intermediate=4864,
    context=9216,
    initializer=0.02,
    last_norm=10.0,
)


def config_of(shape: Shape) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        initializer_range=shape.initializer,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


@torch.no_grad()
def random_model(shape: Shape, device: torch.device, *, seed: int) -> Qwen2ForCausalLM:
    """In float32. No token ends a text."""
    torch.manual_seed(seed)
    with device:
        model = Qwen2ForCausalLM(config_of(shape))
    model.model.norm.weight.fill_(shape.last_norm)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # they begin at 0, and must be seen to be there
            parameter.normal_(std=shape.initializer)
    model.generation_config.eos_token_id = None
    return model


def make_model(shape: Shape, folder: Path, *, device: torch.device, dtype: str, seed: int) -> Path:
    """The model in Hugging Face format; the folder is made. The tokenizer is the demo's, for it is never asked."""
    model = random_model(shape, device, seed=seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for file in (ROOT / "deploy" / "demo" / "models" / "student").glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


@torch.no_grad()
def make_pair(shape: Shape, folder: Path, *, device: torch.device, dtype: str) -> tuple[Path, Path]:
    """Student and teacher: the student is the teacher's first half, and what the other half adds is damped, so that
    the two differ by a spread of divergences. Each letter of a text is a token.
    """
    num_layers = shape.layers // 2
    teacher = random_model(shape, device, seed=0)
    for layer in teacher.model.layers[num_layers:]:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.down_proj.weight.mul_(0.3)
    student = random_model(replace(shape, layers=num_layers), device, seed=0)
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.tie_weights()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"filler{number}" for number in range(shape.vocabulary - len(letters))]
    # transformers loads every Qwen2 model with this class, whatever its folder says.
    vocabulary = {token: number for number, token in enumerate(letters + fillers)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, eos_token=None, pad_token=None)
    for role, model in (("student", student), ("teacher", teacher)):
        model.to(getattr(torch, dtype)).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return folder / "student", folder / "teacher"


def random_text(length: int, vocabulary: int, *, seed: int) -> Ids:
    """[length]"""
    return np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32)


def random_sequences(
    lengths: Sequence[tuple[int, int]], vocabulary: int, *, k: int, seed: int = 0, num_student: Sequence[int] = ()
) -> list[MixedSequence]:
    """One of P prompt and T new tokens for each (P, T). Of the new ones ``num_student`` are the student's, the first
    half where it is not given.

    The teacher's lists hold 0.9 of its mass, on ids of which none comes twice in a row.
    """
    random = np.random.default_rng(seed)
    sequences = []
    for number, (num_prompt, num_new) in enumerate(lengths):
        prompt_ids, token_ids = (
            random.integers(0, vocabulary, size).astype(np.int32) for size in (num_prompt, num_new)
        )
        is_student = np.arange(num_new) < (num_student[number] if num_student else num_new // 2)
        top = _top(random, num_new, vocabulary, k)
        sequences.append(_sequence(str(number), prompt_ids, token_ids, is_student, top))
    return sequences


def _top(random: np.random.Generator, num_rows: int, vocabulary: int, k: int) -> TopLogprobs:
    stride = vocabulary // k
    ids = random.integers(0, stride, (num_rows, k)) + stride * np.arange(k)
    logits = np.sort(random.normal(0.0, 2.0, (num_rows, k)), axis=1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) + np.log(0.9)
    return TopLogprobs(ids.astype(np.int32), logprobs.astype(np.float32))


def _sequence(
    name: str, prompt_ids: Ids, token_ids: Ids, is_student: npt.NDArray[np.bool_], teacher_top: TopLogprobs
) -> MixedSequence:
    num_tokens = token_ids.size
    nothing = np.full(num_tokens, np.nan, np.float32)
    return MixedSequence(
        prompt=Prompt(prompt_id=name, token_ids=prompt_ids, seed=0),
        policy="fixed",
        token_ids=token_ids,
        sources=np.where(is_student, TokenSource.STUDENT, TokenSource.TEACHER).astype(np.uint8),
        divergences=nothing,
        thresholds=nothing,
        student_ranks=np.where(is_student, 0, -1).astype(np.int32),
        student_logprobs=nothing,
        teacher_logprobs=teacher_top.logprob_of(token_ids),
        student_top=TopLogprobs.unknown(num_tokens, teacher_top.k),
        teacher_top=teacher_top,
        weight_versions=np.where(is_student, 0, -1).astype(np.int32),
        switches=np.flatnonzero(~is_student)[:1].astype(np.int32),
        finish_reason="length",
        num_wasted_tokens=0,
    )
