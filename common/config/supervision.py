"""What a run does when a worker dies, hangs or fails."""

from typing import Self

from pydantic import model_validator

from common.config.part import Part, Positive, Seconds


class Supervision(Part):
    """Health checks, and how often failed workers are restarted before the run ends."""

    health_every_s: Seconds = 5.0
    """Pause between two health checks of the workers that the run is waiting for."""
    health_timeout_s: Seconds = 30.0
    """A process that does not answer for this long counts as hung."""
    hang_timeout_s: Seconds = 120.0
    """An engine with calls under way that makes no progress for this long counts as hung. Set it higher than
    the longest prefill takes."""
    max_repairs: Positive = 5
    """Restarts in a row, without a finished step between them, after which the run ends. Restarts during the search for
    a prompt that fails repeatedly do not count, but end the run too when no prompt succeeds for too long."""
    backoff_first_s: Seconds = 1.0
    """Pause before the second restart in a row; doubled for each one after it."""
    backoff_last_s: Seconds = 60.0
    """Maximum of that pause."""
    max_prompt_failures: Positive = 2
    """A prompt that fails this often on its own is quarantined, and the run continues without it."""

    @model_validator(mode="after")
    def _pauses_grow(self) -> Self:
        if self.backoff_last_s < self.backoff_first_s:
            raise ValueError(
                f"backoff_last_s must be >= backoff_first_s ({self.backoff_first_s:g}), got {self.backoff_last_s:g}"
            )
        return self
