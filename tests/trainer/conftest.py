"""Tiny models and made-up sequences for the learner's side.

Test files can't import each other, so what they share are functions behind fixtures of the session.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.sequence import Floats, Ids, MixedSequence, Prompt, TokenSource, TopLogprobs

# Before a test file imports `datasets`: its caches must not land in the user's home.
_cache = tempfile.TemporaryDirectory(prefix="datasets-")
os.environ.setdefault("HF_DATASETS_CACHE", _cache.name)

VOCABULARY_SIZE = 48
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def _make_model(*, tied: bool = False, seed: int = 0, vocabulary_size: int = VOCABULARY_SIZE) -> LlamaForCausalLM:
    """A random Llama whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def _make_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word: w0, w1, ..., and a few that chats use."""
    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", "system"]
    words += [f"w{number}" for number in range(VOCABULARY_SIZE - len(words))]
    backend = Tokenizer(models.WordLevel({word: token_id for token_id, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _make_sequence(
    prompt_ids: Ids, token_ids: Ids, teacher_top: TopLogprobs, *, name: str = "0", num_student_tokens: int | None = None
) -> MixedSequence:
    """A sequence whose first tokens are the student's (all of them by default) and whose rest is the teacher's."""
    num_tokens = token_ids.size
    num_student_tokens = num_tokens if num_student_tokens is None else num_student_tokens
    proposed = np.arange(num_tokens) < num_student_tokens
    nothing = np.full(num_tokens, np.nan, np.float32)
    return MixedSequence(
        prompt=Prompt(prompt_id=name, token_ids=prompt_ids, seed=0),
        policy="adaswitch",
        token_ids=token_ids,
        sources=np.where(proposed, TokenSource.STUDENT, TokenSource.TEACHER).astype(np.uint8),
        divergences=np.where(proposed, np.float32(0.5), np.float32(np.nan)),
        thresholds=nothing,
        student_ranks=np.where(proposed, 0, -1).astype(np.int32),
        student_logprobs=nothing,
        teacher_logprobs=teacher_top.logprob_of(token_ids),
        student_top=TopLogprobs.unknown(num_tokens, teacher_top.k),
        teacher_top=teacher_top,
        weight_versions=np.where(proposed, 0, -1).astype(np.int32),
        switches=np.array([num_student_tokens] if num_student_tokens < num_tokens else [], np.int32),
        finish_reason="length",
        num_wasted_tokens=0,
    )


@torch.no_grad()
def _reference_logprobs(model: LlamaForCausalLM, prompt_ids: Ids, token_ids: Ids) -> Floats:
    """[T, V] nats. The slow and obvious way: one forward pass over the whole vocabulary."""
    input_ids = torch.from_numpy(np.concatenate([prompt_ids, token_ids]).astype(np.int64))[None]
    logprobs = model(input_ids=input_ids).logits[0].double().log_softmax(dim=-1)
    first, last = prompt_ids.size - 1, prompt_ids.size + token_ids.size - 1
    return logprobs[first:last].float().numpy()


def _top_of(logprobs: Floats, k: int) -> TopLogprobs:
    """The k best of each [V] row."""
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k].astype(np.int32)
    return TopLogprobs(ids, np.take_along_axis(logprobs, ids, axis=1))


def _written_by(
    model: LlamaForCausalLM, *, num: int = 6, k: int = 8, seed: int = 0, num_student_tokens: int | None = None
) -> list[MixedSequence]:
    """Random texts of different lengths, with the model's own distributions in the place of the teacher's."""
    rng = np.random.default_rng(seed)
    sequences = []
    for number in range(num):
        prompt_ids, token_ids = (
            rng.integers(0, VOCABULARY_SIZE, size=int(rng.integers(low, 14))).astype(np.int32) for low in (1, 4)
        )
        teacher_top = _top_of(_reference_logprobs(model, prompt_ids, token_ids), k)
        sequences.append(
            _make_sequence(prompt_ids, token_ids, teacher_top, name=str(number), num_student_tokens=num_student_tokens)
        )
    return sequences


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    return _make_model


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _make_tokenizer


@pytest.fixture(scope="session")
def chat_template() -> str:
    return CHAT_TEMPLATE


@pytest.fixture(scope="session")
def make_sequence() -> Callable[..., MixedSequence]:
    return _make_sequence


@pytest.fixture(scope="session")
def reference_logprobs() -> Callable[..., Floats]:
    return _reference_logprobs


@pytest.fixture(scope="session")
def top_of() -> Callable[[Floats, int], TopLogprobs]:
    return _top_of


@pytest.fixture(scope="session")
def written_by() -> Callable[..., list[MixedSequence]]:
    return _written_by


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., str]:
    """Writes a model and the tokenizer where the learner can load them."""

    def save(model: LlamaForCausalLM, name: str = "student") -> str:
        folder = tmp_path / name
        model.save_pretrained(folder)
        _make_tokenizer().save_pretrained(folder)
        return str(folder)

    return save
