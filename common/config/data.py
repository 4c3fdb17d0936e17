"""Prompts to train on and to evaluate on."""

from typing import Literal, Self

from pydantic import model_validator

from common.config.part import Part, Positive


class Data(Part):
    """Prompts: a JSON, JSONL or Parquet file (or a glob of them), or a hub dataset's name.

    A row holds either plain text or chat messages. The tokenizer's chat template is applied to messages.
    """

    path: str
    """File, glob or hub name."""
    name: str | None = None
    """A hub dataset's configuration, as in ``load_dataset(path, name)``."""
    split: str = "train"
    prompt_field: str = "prompt"
    """Column with the text, or with a list of {role, content} messages."""
    as_chat: bool = False
    """Apply the tokenizer's chat template to plain text too, as one user message."""
    answer_field: str | None = None
    """Column with the dataset answer, for evaluation and for policies that train on dataset answers. It holds text, a
    number, or a list of one assistant message."""
    last_turn_is_answer: bool = False
    """The last message of prompt_field is an assistant's and is the dataset answer; the messages before it are the
    prompt. Otherwise a prompt that ends with an assistant message is refused."""
    id_field: str | None = None
    """Column with a unique id. Default: the row's number."""
    max_prompts: Positive | None = None
    """Use only the first n rows."""
    too_long: Literal["refuse", "skip"] = "refuse"
    """What to do with a row whose prompt or dataset answer is too long: stop before the run starts, or skip the row.
    The number of skipped rows is logged. Texts are never cut."""
    shuffle: bool = True
    """Shuffle the rows differently in each epoch. The order depends on the run's seed."""

    @property
    def has_answers(self) -> bool:
        return self.last_turn_is_answer or self.answer_field is not None

    @model_validator(mode="after")
    def _one_source_of_answers(self) -> Self:
        if self.last_turn_is_answer and self.answer_field is not None:
            raise ValueError("answer_field must be left out if last_turn_is_answer is set")
        return self


class Evaluation(Part):
    """Held-out accuracy and divergence, with greedy decoding on the student engine."""

    data: Data
    every_steps: Positive = 20
    """Number of steps between evaluations. The first and the last weights are always evaluated."""
    answer_pattern: str = r"(.+)$"
    """Regular expression searched in the completion. The last group of its last match is compared with the dataset
    answer, or with what the same expression finds in the dataset answer."""
