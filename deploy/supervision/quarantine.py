"""Prompts that a run skips because they fail repeatedly. Records them, and removes them from the data."""

import logging
import time
from collections.abc import Sequence
from typing import Literal

from common.run_dir import RunDir
from common.sequence import Prompt
from trainer.prompts import PromptStream

logger = logging.getLogger(__name__)

Data = Literal["data", "evaluation.data"]


class Quarantine:
    """Quarantined prompts. They are recorded in the run's folder, so that a resumed run skips them too."""

    def __init__(self, folder: RunDir, prompts: PromptStream) -> None:
        self._folder = folder
        self._prompts = prompts
        self._held_out: set[str] = set()  # prompt ids
        for line in folder.read_set_aside():
            self._leave_out(line["data"], line["prompt_id"], line["sample_index"])

    def add(self, prompt: Prompt, *, data: Data, step: int | None, reason: str) -> None:
        """``step``: the step that the prompt was collected for, or None for an evaluation."""
        logger.warning("sequence_id=%s is quarantined: %s", prompt.sequence_id, reason)
        self._folder.append_set_aside(
            {
                "time": time.time(),
                "data": data,
                "prompt_id": prompt.prompt_id,
                "sample_index": prompt.sample_index,
                "step": step,
                "reason": reason,
            }
        )
        self._leave_out(data, prompt.prompt_id, prompt.sample_index)

    def without_quarantined(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that are not quarantined."""
        return [prompt for prompt in prompts if prompt.prompt_id not in self._held_out]

    def _leave_out(self, data: Data, prompt_id: str, sample_index: int) -> None:
        if data == "data":
            self._prompts.leave_out(prompt_id, sample_index)
        else:
            self._held_out.add(prompt_id)
