"""A search for the prompts that make a collection fail: which prompts to try together next. Pure."""

from collections import Counter
from collections.abc import Sequence

from common.sequence import Prompt


class Search:
    """The prompts of one collection: first all together, and one by one after two failures.

    As soon as a prompt fails on its own, the others are tried together again, and after a further failure one by one.
    A prompt that has failed on its own is tried alone after the others, and is given up after ``max_failures``. A
    prompt with a result is never tried again. After a final failure an empty group follows, so that the caller can
    finish its work.
    """

    def __init__(self, prompts: Sequence[Prompt], *, max_failures: int) -> None:
        self._others = list(prompts)  # without a result, and without a failure of their own
        self._failed: list[Prompt] = []  # on their own, to be tried again
        self._tried: list[Prompt] = []  # what of the present group has no result yet
        self._was_alone = False
        self._is_one_by_one = False
        self._is_finished = False
        self._max_failures = max_failures
        self._num_together = 0  # failures of several prompts
        self._num_alone: Counter[str] = Counter()  # sequence id -> failures on its own

    @property
    def is_narrowing(self) -> bool:
        """Whether the next failure makes the search smaller."""
        return self._num_together >= 2 and bool(self._tried)

    def next_group(self) -> list[Prompt] | None:
        """The prompts to try now. None when all are done."""
        if self._is_finished and not self._others and not self._failed:
            return None
        self._tried = self._others[: 1 if self._is_one_by_one else None] or self._failed[:1]
        self._was_alone = len(self._tried) == 1
        return list(self._tried)

    def done(self, sequence_id: str) -> None:
        for prompts in (self._tried, self._others, self._failed):
            prompts[:] = [prompt for prompt in prompts if prompt.sequence_id != sequence_id]

    def succeeded(self) -> None:
        """The group is done."""
        self._is_finished = True
        for prompt in list(self._tried):
            self.done(prompt.sequence_id)

    def failed(self, suspect: str | None = None) -> Prompt | None:
        """The group failed. ``suspect``: the sequence that caused it, if that is known.

        Returns the prompt that is given up now, if any.
        """
        self._is_finished = False
        named = [prompt for prompt in self._tried if prompt.sequence_id == suspect]
        found = named or (self._tried if self._was_alone else [])
        if not found:
            self._num_together += 1
            self._is_one_by_one = self._num_together >= 2
            return None
        self._is_one_by_one = False
        prompt = found[0]
        self.done(prompt.sequence_id)
        self._num_alone[prompt.sequence_id] += 1
        if self._num_alone[prompt.sequence_id] >= self._max_failures:
            return prompt
        self._failed.append(prompt)
        return None
