"""Model pairs to measure with: the demo pair, and a synthetic one made from seeds.

The synthetic teacher is a random Llama whose output projections above the student's layers are damped; the student is
its first layers. So the two agree half-way and differ by a spread of divergences all along a sequence, which a random
pair would not.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.config import AdaSwitch
from common.seeds import derive_seed
from common.sequence import Prompt

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parents[2]
_CACHE = REPOSITORY / "build" / "benchmarks"
_DEMO = REPOSITORY / "deploy" / "demo"

_VOCABULARY_SIZE = 8192
_NUM_PROMPT_TOKENS = 64
_TEACHER_LAYERS, _STUDENT_LAYERS = 8, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOfModels:
    """Two models in Hugging Face format, and what is asked of them."""

    name: str
    student: Path
    teacher: Path
    adaswitch: AdaSwitch  # the rule under which switches fall all along the sequence
    max_new_tokens: int
    top_logprobs: int
    stop_token_ids: tuple[int, ...]

    def prompts(self, count: int) -> list[Prompt]:
        """Always the same ones, in the same order."""
        if self.name == "demo":
            return _demo_prompts(self.student, count)
        return [
            Prompt(prompt_id=str(number), token_ids=_random_text(number), seed=derive_seed("benchmark", number))
            for number in range(count)
        ]


def demo_pair() -> PairOfModels:
    return PairOfModels(
        name="demo",
        student=_DEMO / "models" / "student",
        teacher=_DEMO / "models" / "teacher",
        adaswitch=AdaSwitch(multiplier=3.0, window=10, floor=0.5),
        max_new_tokens=64,
        top_logprobs=32,
        stop_token_ids=(2,),
    )


def synthetic_pair(max_new_tokens: int) -> PairOfModels:
    """Made at the first call, in a few seconds; kept in ``build/benchmarks``."""
    folder = _CACHE / "synthetic"
    if not (folder / "complete").exists():
        logger.info("making the synthetic pair in %s", folder.relative_to(REPOSITORY))
        _make_synthetic(folder)
        (folder / "complete").touch()
    return PairOfModels(
        name="synthetic",
        student=folder / "student",
        teacher=folder / "teacher",
        adaswitch=AdaSwitch(multiplier=3.0, window=10),
        max_new_tokens=max_new_tokens,
        top_logprobs=32,
        stop_token_ids=(),
    )


@torch.no_grad()
def _make_synthetic(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=_TEACHER_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    teacher = LlamaForCausalLM(config)
    teacher.model.norm.weight.fill_(4.0)
    for layer in teacher.model.layers[_STUDENT_LAYERS:]:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.down_proj.weight.mul_(0.3)
    student = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": _STUDENT_LAYERS}))
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.tie_weights()
    tokenizer = _id_tokenizer()
    for role, model in (("teacher", teacher), ("student", student)):
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def _id_tokenizer() -> PreTrainedTokenizerFast:
    """Each id is its own word."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(_VOCABULARY_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def _random_text(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, _VOCABULARY_SIZE, _NUM_PROMPT_TOKENS).astype(np.int32)


def _demo_prompts(model: Path, count: int) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (_DEMO / "data" / "train.jsonl").read_text().splitlines()[:count]
    return [
        Prompt(
            prompt_id=str(number),
            token_ids=np.array(tokenizer(json.loads(line)["prompt"]).input_ids, np.int32),
            seed=derive_seed("benchmark", number),
        )
        for number, line in enumerate(lines)
    ]
