"""Switch policies: one class each, the method's own settings and nothing else."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.divergences import Divergence, ForwardKL
from common.config.part import Fraction, Part, Positive, Threshold


class AdaSwitch(Part):
    """Take over, to the end, at the first divergence above a multiple of its moving average (arXiv 2510.07842)."""

    type: Literal["adaswitch"] = "adaswitch"
    multiplier: Annotated[float, Field(gt=0.0, le=1e6)] = 3.0
    """K: how many times the moving average a divergence must exceed."""
    window: Positive = 10
    """L: positions in the moving average. The paper's value is not public."""
    floor: Threshold = 0.0
    """Nats (for tvd a probability). The threshold is never lower, so that spikes which no longer matter stop causing
    switches."""
    warmup: Positive | None = None
    """First position that may switch. Default: window, the first one whose moving average is filled."""
    divergence: Divergence = ForwardKL()
    """What is compared with the threshold."""

    @model_validator(mode="after")
    def _warmup_fills_the_window(self) -> Self:
        if self.warmup is not None and self.warmup < self.window:
            raise ValueError(f"warmup must be >= window ({self.window}), got {self.warmup}")
        return self

    @property
    def first_position(self) -> int:
        """The first position that may switch."""
        return self.window if self.warmup is None else self.warmup


class SKD(Part):
    """Take one token where the student's is not in the teacher's top k (Speculative KD, arXiv 2410.11325)."""

    type: Literal["skd"] = "skd"
    top_k: Positive = 25
    """The student's token is kept when it is among this many of the teacher's best."""


class OnPolicy(Part):
    """The student writes everything (GKD with lambda = 1, arXiv 2306.13649)."""

    type: Literal["on_policy"] = "on_policy"


class OffPolicy(Part):
    """The teacher writes everything (sequence-level KD, arXiv 1606.07947)."""

    type: Literal["off_policy"] = "off_policy"


class Decay(Part):
    """Take one token where the Jensen-Shannon divergence exceeds a threshold that falls along the sequence, so that the
    teacher steps in more often the longer the text gets (SWITCH, arXiv 2410.19503).
    """

    type: Literal["decay"] = "decay"
    initial_threshold: Threshold = 0.3
    """tau_0, nats; a Jensen-Shannon divergence is at most log 2 = 0.69. Ours, not the paper's."""
    rate: Annotated[float, Field(ge=0.0, le=1e6)] = 0.01
    """lambda, per position: the threshold at position i is tau_0 exp(-lambda i). Ours, not the paper's."""


class Relay(Part):
    """As skd, but for a few tokens, and only a few times (Relay-OPD, arXiv 2607.26057)."""

    type: Literal["relay"] = "relay"
    top_k: Positive = 5
    """The student's token is kept when it is among this many of the teacher's best."""
    guidance_tokens: Positive = 16
    """Tokens the teacher writes before it hands back."""
    max_switches: Positive = 4
    """After this many the student is left alone."""


class Dataset(Part):
    """The given answers of ``data.answer_field`` are the sequences; the teacher only reads them.

    With trainer.loss cross_entropy it is supervised fine-tuning, with a divergence supervised KD (GKD with lambda = 0,
    arXiv 2306.13649).
    """

    type: Literal["dataset"] = "dataset"


class Mixture(Part):
    """Each sequence is either the student's or not (GKD, arXiv 2306.13649)."""

    type: Literal["mixture"] = "mixture"
    student_share: Fraction = 0.5
    """lambda: probability that the student writes a sequence, drawn from the sequence's own seed."""
    rest: Literal["teacher", "dataset"] = "teacher"
    """Whose the other sequences are: written by the teacher, or the given answers of data.answer_field."""


class Fixed(Part):
    """Take over, to the end, at one position: the control for adaswitch."""

    type: Literal["fixed"] = "fixed"
    position: Annotated[int, Field(ge=0)] = 16


Policy = Annotated[
    AdaSwitch | SKD | Decay | Relay | OnPolicy | OffPolicy | Dataset | Mixture | Fixed, Field(discriminator="type")
]
