"""Prompts to train on and to evaluate on."""

from common.config.part import Part, Positive


class Data(Part):
    """Prompts: a JSON, JSONL or Parquet file (or a glob of them), or a hub dataset's name.

    A row holds either plain text or chat messages; messages go through the tokenizer's chat template.
    """

    path: str
    """File, glob or hub name."""
    name: str | None = None
    """A hub dataset's configuration, as in ``load_dataset(path, name)``."""
    split: str = "train"
    prompt_field: str = "prompt"
    """Column with the text, or with a list of {role, content} messages."""
    as_chat: bool = False
    """Send plain text through the tokenizer's chat template too, as one user message."""
    answer_field: str | None = None
    """Column with the expected answer, for evaluation; what is trained on where the policy takes given answers."""
    id_field: str | None = None
    """Column with a unique id. Default: the row's number."""
    max_prompts: Positive | None = None
    """Use only the first n rows."""
    shuffle: bool = True
    """Visit the rows in an order drawn from the run's seed, anew each epoch."""


class Evaluation(Part):
    """Held-out accuracy and divergence, through the student engine, greedily."""

    data: Data
    every_steps: Positive = 20
    """Steps between evaluations; the first and the last weights are always evaluated."""
    answer_pattern: str = r"(.+)$"
    """Regular expression searched in the completion; its last match's last group is compared with the answer, or with
    what the same expression finds in the answer."""
