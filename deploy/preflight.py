"""Everything that can be wrong with a run and be seen without an engine, in seconds: models, tokenizers, prompts.

Raises UserError with one line naming the key. Owns what both sides must agree on: context length and stop tokens.
"""

from dataclasses import dataclass

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from common.config import EngineSettings, RunConfig
from common.errors import UserError
from common.sequence import Ids
from rollout_server.selftest import check_tokenizers
from trainer.evaluate import compile_answer_pattern
from trainer.learner import load_tokenizer
from trainer.loop import HeldOut
from trainer.prompts import PromptStream


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """What a run starts from, checked."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptStream
    held_out: HeldOut | None
    stop_token_ids: tuple[int, ...]  # of either model: a token that ends one's text ends the other's
    max_model_len: int  # tokens, prompt and answer together, that both engines are started with

    @property
    def self_test_prefix(self) -> Ids:
        """[P] A prompt for the engines' self-test."""
        return self.prompts.all()[0].token_ids


def prepare(config: RunConfig) -> Inputs:
    """Load tokenizers and prompts and check them against each other and the models."""
    remote_code = config.engines.trust_remote_code
    student = load_tokenizer(config.models.student, key="models.student", trust_remote_code=remote_code)
    teacher = load_tokenizer(config.models.teacher, key="models.teacher", trust_remote_code=remote_code)
    check_tokenizers(student.get_vocab(), teacher.get_vocab())
    max_model_len = min(
        _context(config.models.student, config.engines.student, "student", remote_code),
        _context(config.models.teacher, config.engines.teacher, "teacher", remote_code),
    )
    max_prompt_tokens = max_model_len - config.sampling.max_new_tokens
    if max_prompt_tokens < 1:
        raise UserError(
            f"sampling.max_new_tokens must leave room for a prompt in the context of {max_model_len} tokens, "
            f"got {config.sampling.max_new_tokens}"
        )
    prompts = PromptStream(
        config.data,
        student,
        seed=config.seed,
        max_prompt_tokens=max_prompt_tokens,
        samples_per_prompt=config.trainer.samples_per_prompt,
    )
    return Inputs(
        tokenizer=student,
        prompts=prompts,
        held_out=_held_out(config, student, max_prompt_tokens),
        stop_token_ids=_stop_token_ids(config.models.student, config.models.teacher),
        max_model_len=max_model_len,
    )


def _held_out(config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> HeldOut | None:
    if config.evaluation is None:
        return None
    prompts = PromptStream(
        config.evaluation.data,
        tokenizer,
        seed=config.seed,
        max_prompt_tokens=max_prompt_tokens,
        key="evaluation.data",
    )
    return HeldOut(
        prompts=prompts.all(),
        every_steps=config.evaluation.every_steps,
        answer_pattern=compile_answer_pattern(config.evaluation.answer_pattern),
        decode=lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True),
    )


def _context(model: str, settings: EngineSettings, role: str, trust_remote_code: bool) -> int:
    """Tokens the engine's context holds: what is asked for, at most what the model was made for."""
    try:
        text_config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"models.{role}: can't read the config of {model!r}: {' '.join(str(error).split())}") from error
    made_for = getattr(text_config, "max_position_embeddings", None)
    if settings.max_model_len is None:
        if made_for is None:
            raise UserError(
                f"engines.{role}.max_model_len must be set: the config of {model!r} names no context length"
            )
        return int(made_for)
    if made_for is not None and settings.max_model_len > made_for:
        raise UserError(
            f"engines.{role}.max_model_len must be <= {made_for}, the context of {model!r}, "
            f"got {settings.max_model_len}"
        )
    return settings.max_model_len


def _stop_token_ids(*models: str) -> tuple[int, ...]:
    """The end-of-sequence ids of all models, from their generation config or, without one, their config."""
    stop_ids: set[int] = set()
    for model in models:
        try:
            found = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:
            found = AutoConfig.from_pretrained(model).get_text_config().eos_token_id
        stop_ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return tuple(sorted(stop_ids))
