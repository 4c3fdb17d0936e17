"""Divergences between teacher and student: what may decide a switch, and what may be trained on."""

from typing import Annotated, Literal

from pydantic import Field

from common.config.part import Part


class ForwardKL(Part):
    """KL(teacher || student), nats."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Part):
    """KL(student || teacher), nats.

    As a loss it is known to be unstable where the list covers little of the teacher: what the student puts outside the
    list is judged as one bucket. ``train/covered_mass`` tells how much the list covers.
    """

    type: Literal["reverse_kl"] = "reverse_kl"


class JSD(Part):
    """Generalised Jensen-Shannon divergence, nats (GKD, arXiv 2306.13649, eq. 2).

    As a loss it holds a reverse KL, and with it the same weakness where the list covers little.
    """

    type: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the mixture."""


class SkewedKL(Part):
    """KL(teacher || alpha teacher + (1 - alpha) student), nats (DistiLLM, arXiv 2402.03898).

    At most log(1 / alpha), whatever the student does: no single token can rule the gradient.
    """

    type: Literal["skewed_kl"] = "skewed_kl"
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Weight of the teacher in the mixture."""


class TVD(Part):
    """Total variation distance, half the sum of |teacher - student| (f-distill, arXiv 2307.15190).

    Not nats but a probability, 0 to 1. Where it is chosen, thresholds and reported values are probabilities too.
    """

    type: Literal["tvd"] = "tvd"


class CrossEntropy(Part):
    """-log student(token), nats, on the sequence as it was written; the teacher's distribution is not looked at.

    A loss and no switch divergence. With the teacher writing everything it is sequence-level KD (arXiv 1606.07947).
    """

    type: Literal["cross_entropy"] = "cross_entropy"


Divergence = Annotated[ForwardKL | ReverseKL | JSD | SkewedKL | TVD, Field(discriminator="type")]
"""What may decide a switch."""

Loss = Annotated[ForwardKL | ReverseKL | JSD | SkewedKL | TVD | CrossEntropy, Field(discriminator="type")]
"""What may be trained on."""
