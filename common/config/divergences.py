"""Divergences between teacher and student, for the switch policies and for the loss."""

from typing import Annotated, Literal

from pydantic import Field

from common.config.part import Part


class ForwardKL(Part):
    """KL(teacher || student), nats."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Part):
    """KL(student || teacher), nats.

    As a loss it is known to be unstable when the top-k list covers little of the teacher's probability, because all of
    the student's probability outside the list is compared as one bucket. ``train/covered_mass`` shows how much the list
    covers.
    """

    type: Literal["reverse_kl"] = "reverse_kl"


class JSD(Part):
    """Generalized Jensen-Shannon divergence, nats (GKD, arXiv 2306.13649, eq. 2).

    As a loss it contains a reverse KL and has the same instability when the list covers little.
    """

    type: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the mixture."""


class SkewedKL(Part):
    """KL(teacher || alpha teacher + (1 - alpha) student), nats (DistiLLM, arXiv 2402.03898).

    At most log(1 / alpha) for any student, so no single token can dominate the gradient.
    """

    type: Literal["skewed_kl"] = "skewed_kl"
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Weight of the teacher in the mixture."""


class TVD(Part):
    """Total variation distance, half the sum of |teacher - student| (f-distill, arXiv 2307.15190).

    A probability from 0 to 1, not nats. With this divergence, thresholds and reported values are probabilities too.
    """

    type: Literal["tvd"] = "tvd"


class CrossEntropy(Part):
    """-log student(token), nats, on the tokens of the sequence. The teacher's distribution is not used.

    Only a loss, not a switch divergence. With policy.type off_policy it is sequence-level KD (arXiv 1606.07947).
    """

    type: Literal["cross_entropy"] = "cross_entropy"


Divergence = Annotated[ForwardKL | ReverseKL | JSD | SkewedKL | TVD, Field(discriminator="type")]
"""Divergences that a switch policy can use."""

Loss = Annotated[ForwardKL | ReverseKL | JSD | SkewedKL | TVD | CrossEntropy, Field(discriminator="type")]
"""Losses that the student can be trained on."""
