"""A row's given answer -> the tokens a model would write for it, its end included.

Owns how an answer continues its prompt and what is refused. Knows nothing of files, models or training.

An answer is a finished text, so it ends with the token that ends a text. It is tokenised apart from its prompt, as
whatever a model writes is. One that is too long is refused like a prompt that is too long: cut, it would teach to stop
in the middle, and leaving it out without a word would change the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import UserError, one_line


@dataclass(frozen=True, kw_only=True)
class AnswerReader:
    """``Dataset.map`` hashes its fields: whoever calls it from there is cached by them."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    max_tokens: int  # the end included
    key: str = "data.answer_field"

    def __call__(
        self, prompts: Sequence[str | list[dict[str, Any]]], answers: Sequence[object], row_numbers: Sequence[int]
    ) -> list[list[int]]:
        """Token ids of each row's answer. A prompt of messages makes the answer a message of the assistant.

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
        """What follows the prompt's text: the answer, or what the chat template makes of it."""
        if isinstance(prompt, str):
            return answer
        # Arrow gives every message the keys of all messages; the template must not see those that were not there.
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
                f"{self.key}: row {row}: the chat template does not render the answer as what follows the prompt; "
                "expected a template without a generation prompt of its own kind, or plain text"
            )
        return whole.removeprefix(before)

    def _ended(self, token_ids: list[int], row: int, *, is_chat: bool) -> list[int]:
        """Up to the one token that ends the text; it is added where there is none.

        A chat template may put something after it, a line break say, which no model is asked to write.
        """
        ends = [place for place, token_id in enumerate(token_ids) if token_id in self._end_token_ids]
        if len(ends) > 1 or (ends and not is_chat and ends[0] < len(token_ids) - 1):
            raise UserError(f"{self.key}: row {row} holds a token that ends a text before its end")
        ended = token_ids[: ends[0] + 1] if ends else [*token_ids, self._end_token_ids[0]]
        if len(ended) > self.max_tokens:
            raise UserError(
                f"{self.key}: row {row} has {len(ended)} tokens, its end included, expected at most {self.max_tokens}; "
                "shorten it or raise sampling.max_new_tokens"
            )
        return ended

    @property
    def _end_token_ids(self) -> tuple[int, ...]:
        """The one that is added first."""
        of_tokenizer = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        ends = (*of_tokenizer, *self.stop_token_ids)
        if not ends:
            raise UserError("models.student: neither tokenizer nor model names a token that ends a text")
        return ends
