"""Finds errors of a run in seconds, without an engine: in models, tokenizers and prompts.

Raises UserError with one line naming the key. Sets what both sides must agree on: context length and stop tokens.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from common.config import EngineSettings, RunConfig
from common.errors import UserError, one_line
from common.sequence import Ids
from deploy.reporting.trackers import refuse_missing_packages
from rollout_server.engines.selftest import check_tokenizers
from trainer.answers import AnswerReader
from trainer.evaluate import compile_answer_pattern
from trainer.loop import HeldOut
from trainer.pretrained import load_tokenizer
from trainer.prompts import PromptCursor, PromptStream

logger = logging.getLogger(__name__)

Role = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """The checked inputs of a run."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptStream
    held_out: HeldOut | None
    stop_token_ids: tuple[int, ...]  # of both models: a token that stops one also stops the other
    max_model_len: int  # tokens, prompt and answer together; both engines start with this value
    top_logprobs: int  # k: as configured, at most the smaller vocabulary size

    @property
    def self_test_prefix(self) -> Ids:
        """[P] A prompt for the engines' self-test."""
        return self.prompts.all()[0].token_ids


def prepare(config: RunConfig, *, cursor: PromptCursor | None = None) -> Inputs:
    """Load tokenizers and prompts and check them against each other and the models.

    ``cursor`` is the position in the prompts at which a resumed run continues.
    """
    refuse_missing_packages(config.logging)
    _check_vllm_options(config)
    remote_code = config.engines.trust_remote_code
    student = load_tokenizer(config.models.student, key="models.student", trust_remote_code=remote_code)
    teacher = load_tokenizer(config.models.teacher, key="models.teacher", trust_remote_code=remote_code)
    check_tokenizers(student.get_vocab(), teacher.get_vocab())
    text_configs = {role: _text_config(config, role) for role in ("student", "teacher")}
    max_model_len = min(
        _context(text_configs["student"], config.engines.student, "student"),
        _context(text_configs["teacher"], config.engines.teacher, "teacher"),
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
        cursor=cursor,
        answers=_answers(config, student),
    )
    return Inputs(
        tokenizer=student,
        prompts=prompts,
        held_out=_held_out(config, student, max_prompt_tokens),
        stop_token_ids=_stop_token_ids(config),
        max_model_len=max_model_len,
        top_logprobs=min(config.engines.top_logprobs, *(text.vocab_size for text in text_configs.values())),
    )


def _check_vllm_options(config: RunConfig) -> None:
    """Reject arguments that vLLM does not have. Importing vLLM takes seconds, so do it only if there are any."""
    engines = {"student": config.engines.student, "teacher": config.engines.teacher}
    for role, settings in engines.items():
        if settings.vllm:
            from rollout_server.engines.vllm_options import checked_options

            checked_options(settings.vllm, key=f"engines.{role}.vllm")


def _answers(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> AnswerReader | None:
    """The reader of dataset answers, if the run trains on them. They may have ``max_new_tokens`` tokens."""
    if not config.takes_given_answers:
        return None
    stop_token_ids = _stop_token_ids(config)
    return AnswerReader(
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        max_tokens=config.sampling.max_new_tokens,
        refuses_too_long=config.data.too_long == "refuse",
    )


def _held_out(config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> HeldOut | None:
    if config.evaluation is None:
        return None
    if config.evaluation.data.as_chat != config.data.as_chat:
        logger.warning(
            "evaluation.data.as_chat is %s, but data.as_chat is %s: held-out prompts have another form than those that "
            "are trained on",
            *(str(data.as_chat).lower() for data in (config.evaluation.data, config.data)),
        )
    if not config.evaluation.data.has_answers:
        logger.warning("evaluation.data.answer_field is not set: the evaluation has no accuracy, only divergences")
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


def _text_config(config: RunConfig, role: Role) -> PreTrainedConfig:
    """The text model's config."""
    model: str = getattr(config.models, role)
    try:
        loaded = AutoConfig.from_pretrained(model, trust_remote_code=config.engines.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"models.{role}: can't read the config of {model!r}: {one_line(error)}") from error
    if role == "student" and getattr(loaded, "quantization_config", None) is not None:
        raise UserError(f"models.student: {model} has quantized weights; expected weights that can be trained")
    return loaded.get_text_config()


def _context(model: PreTrainedConfig, settings: EngineSettings, role: str) -> int:
    """The engine's context length in tokens: as configured, at most the model's maximum."""
    made_for = getattr(model, "max_position_embeddings", None)
    if settings.max_model_len is None:
        if made_for is None:
            raise UserError(f"engines.{role}.max_model_len must be set: models.{role} gives no context length")
        return int(made_for)
    if made_for is not None and settings.max_model_len > made_for:
        raise UserError(
            f"engines.{role}.max_model_len must be <= {made_for}, the context length of models.{role}, "
            f"got {settings.max_model_len}"
        )
    return settings.max_model_len


def _stop_token_ids(config: RunConfig) -> tuple[int, ...]:
    """The end-of-sequence ids of all models, from their generation config or, without one, their config."""
    stop_ids: set[int] = set()
    roles: tuple[Role, ...] = ("student", "teacher")
    for role in roles:
        try:
            found = GenerationConfig.from_pretrained(getattr(config.models, role)).eos_token_id
        except OSError:
            found = _text_config(config, role).eos_token_id
        stop_ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return tuple(sorted(stop_ids))
