"""What a run does when a part of it dies, hangs or fails."""

from typing import Self

from pydantic import model_validator

from common.config.part import Part, Positive, Seconds


class Supervision(Part):
    """Health checks, and how often what fails is started again before the run ends."""

    health_every_s: Seconds = 5.0
    """Pause between two looks at everyone whose work is waited for."""
    health_timeout_s: Seconds = 30.0
    """A process that does not answer for this long is taken for hung."""
    hang_timeout_s: Seconds = 120.0
    """An engine with calls under way that makes no progress for this long is taken for hung. Longer than its longest
    prefill."""
    max_repairs: Positive = 5
    """Repairs in a row, without a finished step between them, after which the run ends. Those that search for a prompt
    which fails again and again do not count, but end the run too when they go on too long with nothing written."""
    backoff_first_s: Seconds = 1.0
    """Pause before the second repair in a row; doubled for each that follows."""
    backoff_last_s: Seconds = 60.0
    """The longest such pause."""
    max_prompt_failures: Positive = 2
    """A prompt that fails so often on its own is set aside, and the run goes on without it."""

    @model_validator(mode="after")
    def _pauses_grow(self) -> Self:
        if self.backoff_last_s < self.backoff_first_s:
            raise ValueError(
                f"backoff_last_s must be >= backoff_first_s ({self.backoff_first_s:g}), got {self.backoff_last_s:g}"
            )
        return self
