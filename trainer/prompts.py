"""PromptStream: reads prompts from files or a hub dataset, in a seeded order that can be resumed at any point.

Owns loading, checking, tokenizing, ids, seeds and the order. Does not depend on models, engines or training.

Every row is checked and tokenized once, when the stream is made, so that a bad row stops a run before its first engine
starts and not hours later. The token ids are memory-mapped from an Arrow file in the cache of ``datasets``: a million
rows use disk and no memory, and a new run with the same rows, tokenizer and settings reuses the file.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.config import Data
from common.errors import UserError, one_line
from common.seeds import derive_seed
from common.sequence import Prompt
from trainer.answers import AnswerReader
from trainer.rows import Rows, answer_text, load_rows, rows_of

logger = logging.getLogger(__name__)

MAX_PROMPT_ID_LENGTH = 128
FEATURES = Features(
    {
        "prompt_id": Value("string"),
        "token_ids": List(Value("int32")),
        "answer": Value("string"),
        "answer_token_ids": List(Value("int32")),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCursor:
    """Position of a stream: all rows of earlier epochs and ``position`` rows of this epoch's order were taken."""

    epoch: int = 0
    position: int = 0
    rows: str = field(default="", compare=False)  # fingerprint of the rows; empty if it is not known

    def __post_init__(self) -> None:
        assert self.epoch >= 0, self.epoch
        assert self.position >= 0, self.position


class PromptStream:
    """An endless stream of prompts, epoch after epoch. Its cursor and its skipped samples change.

    ``key`` is the path of ``config`` in the configuration and starts every error message. ``max_prompt_tokens`` is the
    context length left for a prompt. ``answers`` is given if dataset answers are trained on. Raises UserError for rows
    that can't become a prompt or an answer.
    """

    def __init__(
        self,
        config: Data,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        max_prompt_tokens: int,
        samples_per_prompt: int = 1,
        cursor: PromptCursor | None = None,
        answers: AnswerReader | None = None,
        key: str = "data",
    ) -> None:
        reader = _RowReader(
            config=config, tokenizer=tokenizer, max_prompt_tokens=max_prompt_tokens, answers=answers, key=key
        )
        rows = load_rows(config, key)
        self._rows = _tokenized_rows(rows, config, reader, key)
        self._fingerprint = rows.fingerprint
        self._seed = seed
        self._shuffle = config.shuffle
        self._samples_per_prompt = samples_per_prompt
        self._cursor = self._checked(cursor or PromptCursor(), f"{key}.path: {config.path!r}")
        self._skipped: set[tuple[str, int]] = set()  # prompt id, sample index

    def _checked(self, cursor: PromptCursor, place: str) -> PromptCursor:
        """The cursor with this stream's fingerprint. Raises UserError if it is one of other rows."""
        if cursor.rows and cursor.rows != self._fingerprint:
            raise UserError(f"{place} has changed since the run started; expected the same rows when a run is resumed")
        if cursor.position >= len(self):
            raise UserError(
                f"{place} has {len(self)} rows, expected more than the {cursor.position} rows of this epoch that the "
                "run has already used; resume with the same rows"
            )
        return replace(cursor, rows=self._fingerprint)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    @property
    def cursor(self) -> PromptCursor:
        """Where the next ``take`` begins. A new stream with this cursor gives the same prompts as this one."""
        return self._cursor

    def go_to(self, cursor: PromptCursor) -> None:
        """Continue from this cursor, for a run that resumes from a checkpoint."""
        self._cursor = replace(cursor, rows=self._fingerprint)

    def leave_out(self, prompt_id: str, sample_index: int) -> None:
        """Skip this sample in all epochs. The positions of all rows stay the same."""
        self._skipped.add((prompt_id, sample_index))

    def take(self, num_rows: int) -> list[Prompt]:
        """Prompts of the next rows, samples_per_prompt for each row except skipped ones. Continues into the next epoch
        at the end of this one.
        """
        taken, self._cursor = self._from_cursor(num_rows)
        return taken

    def peek(self, num_rows: int) -> list[Prompt]:
        """The prompts that ``take`` would return, without moving the cursor."""
        return self._from_cursor(num_rows)[0]

    def _from_cursor(self, num_rows: int) -> tuple[list[Prompt], PromptCursor]:
        """Prompts of the next rows, and the cursor after them."""
        prompts: list[Prompt] = []
        epoch, position = self._cursor.epoch, self._cursor.position
        while num_rows > 0:
            rows = self._order(epoch)[position : position + num_rows]
            prompts += self._prompts(rows, epoch)
            num_rows -= rows.size
            position += rows.size
            if position == len(self):
                epoch, position = epoch + 1, 0
        return prompts, PromptCursor(epoch=epoch, position=position, rows=self._fingerprint)

    def all(self) -> list[Prompt]:
        """Every prompt of epoch 0 in the order of the rows, for evaluation. Ignores the cursor and ``shuffle``."""
        return self._prompts(np.arange(len(self)), epoch=0)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """[rows] The order of an epoch. Depends only on run seed, epoch and number of rows."""
        if not self._shuffle:
            return np.arange(len(self))
        return np.random.default_rng(derive_seed("order", self._seed, epoch)).permutation(len(self))

    def _prompts(self, rows: npt.NDArray[np.int64], epoch: int) -> list[Prompt]:
        columns = self._rows[rows.tolist()]
        return [
            Prompt(
                prompt_id=prompt_id,
                token_ids=np.asarray(token_ids, np.int32),
                seed=prompt_seed(self._seed, epoch, prompt_id, sample_index),
                epoch=epoch,
                sample_index=sample_index,
                answer=answer,
                answer_token_ids=None if answer_token_ids is None else np.asarray(answer_token_ids, np.int32),
            )
            for prompt_id, token_ids, answer, answer_token_ids in zip(
                *(columns[name] for name in FEATURES), strict=True
            )
            for sample_index in range(self._samples_per_prompt)
            if (prompt_id, sample_index) not in self._skipped
        ]


def prompt_seed(run_seed: int, epoch: int, prompt_id: str, sample_index: int) -> int:
    """The sample's seed. It does not depend on the order of the rows, the size of a step or the number of engines."""
    return derive_seed("sample", run_seed, epoch, prompt_id, sample_index)


# ------------------------------------------------------------------------------------------------------------ rows


def _tokenized_rows(rows: Rows, config: Data, reader: "_RowReader", key: str) -> Dataset:
    """The dataset with the columns FEATURES, all rows checked."""
    fields = {"prompt_field": config.prompt_field, "answer_field": config.answer_field, "id_field": config.id_field}
    for setting, column in fields.items():
        if column is not None and not rows.has_column(column):
            raise UserError(
                f"{key}.{setting}: no column {column!r} in {config.path!r}, expected one of {rows.column_names()}"
            )
    if config.max_prompts is not None:
        rows = rows.first(config.max_prompts)
    tokenized = rows.dataset.map(
        reader,
        batched=True,
        with_indices=True,
        remove_columns=rows.dataset.column_names,
        features=FEATURES,
        desc=f"Tokenizing {key}",
    )
    if config.too_long == "skip" and (num_skipped := len(rows) - len(tokenized)):
        logger.warning("%s: skipped %d of %d rows, which are too long", key, num_skipped, len(rows))
        if len(tokenized) == 0:
            raise UserError(f"{key}.too_long: all {len(rows)} rows are too long, expected at least one that is not")
    if config.id_field is not None:
        _refuse_repeated_ids(tokenized["prompt_id"], f"{key}.id_field")
    return tokenized


def _refuse_repeated_ids(prompt_ids: Iterable[str], key: str) -> None:
    first_rows: dict[str, int] = {}
    for row, prompt_id in enumerate(prompt_ids):
        first_row = first_rows.setdefault(prompt_id, row)
        if first_row != row:
            raise UserError(f"{key}: rows {first_row} and {row} both have {prompt_id!r}, expected unique ids")


@dataclass(frozen=True, kw_only=True)
class _RowReader:
    """A batch of rows -> their prompt ids, token ids and answers. ``Dataset.map`` calls it and hashes its fields."""

    config: Data
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    answers: AnswerReader | None
    key: str

    def __call__(self, batch: dict[str, list[Any]], row_numbers: list[int]) -> dict[str, list[Any]]:
        rows = rows_of(batch)
        prompts: list[Any] = [row.get(self.config.prompt_field) for row in rows]
        for prompt, number in zip(prompts, row_numbers, strict=True):
            self._check_prompt(prompt, number)
        answers = [self._answer(row, number) for row, number in zip(rows, row_numbers, strict=True)]
        if self.config.last_turn_is_answer:
            prompts = [prompt[:-1] for prompt in prompts]
        if self.config.as_chat:
            prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        id_field = self.config.id_field
        ids = row_numbers if id_field is None else [row.get(id_field) for row in rows]
        read: dict[str, list[Any]] = {
            "prompt_id": [self._prompt_id(value, row) for value, row in zip(ids, row_numbers, strict=True)],
            "token_ids": self._token_ids(prompts, row_numbers),
            "answer": answers,
            "answer_token_ids": self.answers(prompts, answers, row_numbers) if self.answers else [None] * len(prompts),
        }
        kept = [place for place in range(len(rows)) if self._fits(read, place)]
        return {name: [values[place] for place in kept] for name, values in read.items()}

    def _fits(self, read: dict[str, list[Any]], place: int) -> bool:
        """False only where rows that are too long are skipped: the others were refused before."""
        answer = read["answer_token_ids"][place]
        fits = self.answers is None or len(answer) <= self.answers.max_tokens
        return fits and len(read["token_ids"][place]) <= self.max_prompt_tokens

    def _answer(self, row: dict[str, Any], number: int) -> str | None:
        """The row's answer as text, or None."""
        messages = row.get(self.config.prompt_field)
        last = messages[-1] if isinstance(messages, list) else None
        ends_answered = isinstance(last, dict) and last.get("role") == "assistant"
        place = f"{self.key}.prompt_field: row {number}"
        if ends_answered != self.config.last_turn_is_answer:
            raise UserError(
                f"{place} {'ends' if ends_answered else 'does not end'} with an assistant message; "
                + (
                    f"expected one of a user. Set {self.key}.last_turn_is_answer to use it as the dataset answer"
                    if ends_answered
                    else f"expected one, because {self.key}.last_turn_is_answer is set"
                )
            )
        if self.config.last_turn_is_answer:
            return answer_text([last], place)
        if self.config.answer_field is None:
            return None
        return answer_text(row.get(self.config.answer_field), f"{self.key}.answer_field: row {number}")

    def _token_ids(self, prompts: list[Any], row_numbers: list[int]) -> list[list[int]]:
        # One call for all texts uses the tokenizer's threads and is several times faster than one call per row.
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        text_ids = iter(self.tokenizer(texts).input_ids if texts else ())
        token_ids = [
            next(text_ids) if isinstance(prompt, str) else self._chat_token_ids(prompt, row)
            for prompt, row in zip(prompts, row_numbers, strict=True)
        ]
        for ids, row in zip(token_ids, row_numbers, strict=True):
            too_long = len(ids) > self.max_prompt_tokens and self.config.too_long == "refuse"
            if too_long or not ids:
                raise UserError(
                    f"{self.key}.prompt_field: row {row} has {len(ids)} tokens, expected 1 to "
                    f"{self.max_prompt_tokens}; shorten it, set {self.key}.too_long to skip, lower "
                    "sampling.max_new_tokens or raise max_model_len of both engines"
                )
        return token_ids

    def _check_prompt(self, prompt: object, row: int) -> None:
        place = f"{self.key}.prompt_field: row {row}"
        if not isinstance(prompt, (str, list)) and prompt is not None:
            kind = type(prompt).__name__
            raise UserError(f"{place} holds {kind} {prompt!r}, expected text or a list of {{role, content}} messages")
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise UserError(f"{place} is empty, expected text or a list of {{role, content}} messages")

    def _chat_token_ids(self, messages: list[Any], row: int) -> list[int]:
        place = f"{self.key}.prompt_field: row {row}"
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise UserError(f"{place} holds the message {message!r}, expected text under role and under content")
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{place} holds chat messages, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template; "
                "expected plain text or a model with one"
            )
        # In Parquet a message has the keys of all messages. The template must not see the added ones.
        original = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            encoding = self.tokenizer.apply_chat_template(original, add_generation_prompt=True, return_dict=True)
        except (TemplateError, ValueError) as error:
            raise UserError(f"{place} is refused by the chat template: {one_line(error)}") from error
        return list(encoding["input_ids"])

    def _prompt_id(self, value: object, row: int) -> str:
        """The id as text that is safe in file names and URLs. Other characters become ~ and two hex digits per byte."""
        if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
            raise UserError(f"{self.key}.id_field: row {row} holds {value!r}, expected text or a whole number")
        prompt_id = quote(str(value), safe="").replace("~", "%7E").replace("%", "~")
        if len(prompt_id) > MAX_PROMPT_ID_LENGTH:
            raise UserError(
                f"{self.key}.id_field: row {row} holds {value!r}, {len(prompt_id)} characters when made safe for file "
                f"names, expected at most {MAX_PROMPT_ID_LENGTH}"
            )
        return prompt_id
