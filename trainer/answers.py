"""A row's dataset answer -> the tokens that a model would generate for it, with the end token.

Owns how an answer continues its prompt, and which answers are refused. Does not depend on files, models or training.

An answer is a complete text, so it ends with an end token. It is tokenized separately from its prompt, like the tokens
that a model generates. An answer that is too long is refused, or its row is skipped and counted, like a prompt that is
too long. It is never cut: the student would learn to stop in the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import UserError, one_line


@dataclass(frozen=True, kw_only=True)
class AnswerReader:
    """Reads dataset answers. ``Dataset.map`` hashes its fields for the cache key."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    max_tokens: int  # including the end token
    refuses_too_long: bool = True
    key: str = "data.answer_field"

    def __call__(
        self, prompts: Sequence[str | list[dict[str, Any]]], answers: Sequence[object], row_numbers: Sequence[int]
    ) -> list[list[int]]:
        """Token ids of each row's answer. If the prompt is chat messages, the answer is an assistant message.

        Raises UserError naming the field and the row.
        """
        texts = [
            self._continuation(prompt, self._text(answer, row), row)
            for prompt, answer, row in zip(prompts, answers, row_numbers, strict=True)
        ]
        token_ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [
            self._ended(ids, row, is_chat=not isinstance(prompt, str))
            for ids, prompt, row in zip(token_ids, prompts, row_numbers, strict=True)
        ]

    def _text(self, answer: object, row: int) -> str:
        if answer is None or not str(answer).strip():
            raise UserError(f"{self.key}: row {row} has no answer, expected text to train on")
        return str(answer)

    def _continuation(self, prompt: str | list[dict[str, Any]], answer: str, row: int) -> str:
        """The text after the prompt: the answer, or the answer as the chat template renders it."""
        if isinstance(prompt, str):
            return answer
        # In Parquet a message has the keys of all messages. The template must not see the added ones.
        messages = [{name: value for name, value in message.items() if value is not None} for message in prompt]
        answered = [*messages, {"role": "assistant", "content": answer}]
        try:
            before: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            whole: str = self.tokenizer.apply_chat_template(answered, tokenize=False)
        except (TemplateError, ValueError) as error:
            reason = one_line(error)
            raise UserError(f"{self.key}: row {row} is refused by the chat template: {reason}") from error
        if not whole.startswith(before):
            raise UserError(
                f"{self.key}: row {row}: the chat template does not render the answer as a continuation of the "
                "prompt; expected a template whose assistant messages start with its generation prompt, or plain text"
            )
        return whole.removeprefix(before)

    def _ended(self, token_ids: list[int], row: int, *, is_chat: bool) -> list[int]:
        """The tokens up to the end token, which is added if there is none.

        A chat template may add text after it, such as a line break, which no model should generate.
        """
        ends = [place for place, token_id in enumerate(token_ids) if token_id in self._end_token_ids]
        if len(ends) > 1 or (ends and not is_chat and ends[0] < len(token_ids) - 1):
            raise UserError(f"{self.key}: row {row} holds an end token before its end")
        ended = token_ids[: ends[0] + 1] if ends else [*token_ids, self._end_token_ids[0]]
        if len(ended) > self.max_tokens and self.refuses_too_long:
            raise UserError(
                f"{self.key}: row {row} has {len(ended)} tokens with its end token, expected at most "
                f"{self.max_tokens}; shorten it, set data.too_long to skip or raise sampling.max_new_tokens"
            )
        return ended

    @property
    def _end_token_ids(self) -> tuple[int, ...]:
        """All end tokens. The first one is the one that is added."""
        of_tokenizer = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        ends = (*of_tokenizer, *self.stop_token_ids)
        if not ends:
            raise UserError("models.student: neither the tokenizer nor the model has an end token")
        return ends
