"""Switch policies. Each class has only the settings of its own method."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.divergences import Divergence, ForwardKL
from common.config.part import Fraction, Part, Positive, Threshold


class AdaSwitch(Part):
    """The teacher takes over at the first divergence above a multiple of its moving average (arXiv 2510.07842)."""

    type: Literal["adaswitch"] = "adaswitch"
    multiplier: Annotated[float, Field(gt=0.0, le=1e6)] = 3.0
    """K: a divergence must exceed this multiple of its moving average."""
    window: Positive = 10
    """L: number of positions in the moving average. The paper does not publish its value."""
    floor: Threshold = 0.0
    """Nats (a probability for tvd). Lower limit of the threshold, so that spikes that no longer matter don't cause
    switches."""
    warmup: Positive | None = None
    """First position that may switch. Default: window, the first position with a full moving average."""
    divergence: Divergence = ForwardKL()
    """The divergence that is compared with the threshold."""

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
    """The teacher writes one token where the student's is not in its top k (Speculative KD, arXiv 2410.11325)."""

    type: Literal["skd"] = "skd"
    top_k: Positive = 25
    """The student's token is kept if it is among this many of the teacher's most probable tokens."""


class OnPolicy(Part):
    """The student writes all tokens (GKD with lambda = 1, arXiv 2306.13649)."""

    type: Literal["on_policy"] = "on_policy"


class OffPolicy(Part):
    """The teacher writes all tokens (sequence-level KD, arXiv 1606.07947)."""

    type: Literal["off_policy"] = "off_policy"


class Decay(Part):
    """The teacher writes one token where the Jensen-Shannon divergence exceeds a threshold. The threshold falls along
    the sequence, so the teacher writes more often as the text gets longer (SWITCH, arXiv 2410.19503).
    """

    type: Literal["decay"] = "decay"
    initial_threshold: Threshold = 0.3
    """tau_0, nats. A Jensen-Shannon divergence is at most log 2 = 0.69. Our default, not the paper's."""
    rate: Annotated[float, Field(ge=0.0, le=1e6)] = 0.01
    """lambda, per position: the threshold at position i is tau_0 exp(-lambda i). Our default, not the paper's."""


class Relay(Part):
    """Like skd, but the teacher writes several tokens at a switch, and the number of switches is limited (Relay-OPD,
    arXiv 2607.26057).
    """

    type: Literal["relay"] = "relay"
    top_k: Positive = 5
    """The student's token is kept if it is among this many of the teacher's most probable tokens."""
    guidance_tokens: Positive = 16
    """Number of tokens that the teacher writes before the student continues."""
    max_switches: Positive = 4
    """After this many switches the student writes the rest alone."""


class Dataset(Part):
    """The dataset answers of ``data.answer_field`` are the sequences. The teacher only scores them.

    With trainer.loss cross_entropy this is supervised fine-tuning, with a divergence it is supervised KD (GKD with
    lambda = 0, arXiv 2306.13649).
    """

    type: Literal["dataset"] = "dataset"


class Mixture(Part):
    """Some sequences are the student's, the others come from ``rest`` (GKD, arXiv 2306.13649)."""

    type: Literal["mixture"] = "mixture"
    student_share: Fraction = 0.5
    """lambda: probability that the student writes a sequence. It is drawn from the sequence's own seed."""
    rest: Literal["teacher", "dataset"] = "teacher"
    """Source of the other sequences: the teacher writes them, or they are the dataset answers of data.answer_field."""


class Fixed(Part):
    """The teacher writes the rest from one fixed position: a control experiment for adaswitch."""

    type: Literal["fixed"] = "fixed"
    position: Annotated[int, Field(ge=0)] = 16


Policy = Annotated[
    AdaSwitch | SKD | Decay | Relay | OnPolicy | OffPolicy | Dataset | Mixture | Fixed, Field(discriminator="type")
]
