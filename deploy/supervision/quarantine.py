"""Prompts that a run goes on without, because they fail again and again. Owns who must know of them."""

import logging
import time
from collections.abc import Sequence
from typing import Literal

from common.run_dir import RunDir
from common.sequence import Prompt
from trainer.prompts import PromptStream

logger = logging.getLogger(__name__)

Data = Literal["data", "evaluation.data"]


class SetAside:
    """Kept in the run's folder, so that a resumed run leaves them out too."""

    def __init__(self, folder: RunDir, prompts: PromptStream) -> None:
        self._folder = folder
        self._prompts = prompts
        self._held_out: set[str] = set()  # prompt ids
        for line in folder.read_set_aside():
            self._leave_out(line["data"], line["prompt_id"], line["sample_index"])

    def add(self, prompt: Prompt, *, data: Data, step: int | None, reason: str) -> None:
        """``step``: for which the prompt was to be collected; None for an evaluation."""
        logger.warning("sequence_id=%s is set aside: %s", prompt.sequence_id, reason)
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

    def sift_held_out(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Without those that are set aside."""
        return [prompt for prompt in prompts if prompt.prompt_id not in self._held_out]

    def _leave_out(self, data: Data, prompt_id: str, sample_index: int) -> None:
        if data == "data":
            self._prompts.leave_out(prompt_id, sample_index)
        else:
            self._held_out.add(prompt_id)
