"""Finds the prompts that make a collection fail, by bisection: chooses which prompts to try together. Pure."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from common.sequence import Prompt


@dataclass(slots=True)
class _Group:
    prompts: list[Prompt]  # those without a result yet
    num_failures: int = 0
    was_alone: bool = False  # whether it had a single prompt when it was last tried


class Search:
    """The prompts of one collection, in groups that are tried one after another.

    The first group holds all prompts. If it fails twice in a row it is split in halves, and from then on every group
    that fails is split. A prompt that has failed ``max_failures`` times on its own is given up. A prompt with a result
    is never tried again. If the last prompt is given up, an empty group follows, so that the caller can finish.
    """

    def __init__(self, prompts: Sequence[Prompt], *, max_failures: int) -> None:
        self._groups = deque([_Group(list(prompts))])
        self._max_failures = max_failures
        self._num_alone: Counter[str] = Counter()  # sequence id -> failures on its own
        self._has_split = False

    @property
    def is_narrowing(self) -> bool:
        """Whether the next failure will split a group or give up a prompt."""
        return self._has_split and bool(self._groups[0].prompts)

    def next_group(self) -> list[Prompt] | None:
        """The prompts to try now, or None at the end."""
        if not self._groups:
            return None
        group = self._groups[0]
        group.was_alone = len(group.prompts) == 1
        return list(group.prompts)

    def done(self, sequence_id: str) -> None:
        group = self._groups[0]
        group.prompts = [prompt for prompt in group.prompts if prompt.sequence_id != sequence_id]

    def succeeded(self) -> None:
        """All prompts of the group have a result."""
        self._groups.popleft()

    def failed(self, suspect: str | None = None) -> Prompt | None:
        """The group failed. ``suspect``: the sequence that caused it, if known.

        Returns the prompt that is given up, if any.
        """
        group = self._groups.popleft()
        named = [prompt for prompt in group.prompts if prompt.sequence_id == suspect]
        others = [prompt for prompt in group.prompts if prompt.sequence_id != suspect]
        if named:
            self._put_back(_Group(others, group.num_failures))
            return self._failed_alone(named[0])
        if group.was_alone and group.prompts:
            return self._failed_alone(group.prompts[0])
        group.num_failures += 1
        if len(group.prompts) > 1 and (self._has_split or group.num_failures >= 2):
            self._has_split = True
            middle = len(group.prompts) // 2
            self._groups.extendleft([_Group(group.prompts[middle:]), _Group(group.prompts[:middle])])
        else:
            self._groups.appendleft(group)
        return None

    def _failed_alone(self, prompt: Prompt) -> Prompt | None:
        self._num_alone[prompt.sequence_id] += 1
        if self._num_alone[prompt.sequence_id] < self._max_failures:
            self._groups.append(_Group([prompt]))
            return None
        if not self._groups:
            self._groups.append(_Group([]))
        return prompt

    def _put_back(self, group: _Group) -> None:
        if group.prompts:
            self._groups.appendleft(group)
