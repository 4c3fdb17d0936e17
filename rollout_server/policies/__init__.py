"""Switch policies: at which proposed position does the teacher take over? Pure functions of the scored positions.

A policy never calls an engine and never reads configuration other than its own settings. Its decision depends only on
the positions up to the one decided, so judging a finished sequence gives the same switch as judging it chunk by chunk
("online equals post hoc"). One module per method. To add one, write a class, add its settings to ``common/config`` and
a line to the table below.
"""

from collections.abc import Callable
from typing import Any

from common.config import (
    JSD,
    SKD,
    AdaSwitch,
    Dataset,
    Decay,
    Divergence,
    Fixed,
    ForwardKL,
    Mixture,
    OffPolicy,
    OnPolicy,
    Policy,
    Relay,
)
from rollout_server.policies.adaswitch import AdaSwitchPolicy, moving_average
from rollout_server.policies.decay import DecayPolicy
from rollout_server.policies.predetermined import DatasetPolicy, FixedPolicy, MixturePolicy
from rollout_server.policies.protocol import Decision, ScoredPositions, SwitchPolicy
from rollout_server.policies.relay import RelayPolicy
from rollout_server.policies.skd import SKDPolicy

__all__ = ["Decision", "ScoredPositions", "SwitchPolicy", "divergence_of", "make_policy", "moving_average"]

_POLICIES: dict[type, Callable[[Any], SwitchPolicy]] = {
    AdaSwitch: AdaSwitchPolicy,
    SKD: SKDPolicy,
    Decay: DecayPolicy,
    Relay: RelayPolicy,
    OnPolicy: lambda _: FixedPolicy(None),
    OffPolicy: lambda _: FixedPolicy(0),
    Dataset: lambda _: DatasetPolicy(),
    Mixture: MixturePolicy,
    Fixed: lambda settings: FixedPolicy(settings.position),
}


def make_policy(settings: Policy) -> SwitchPolicy:
    """The policy for these settings."""
    return _POLICIES[type(settings)](settings)


def divergence_of(settings: Policy) -> Divergence:
    """The divergence that the verifier computes for this policy. Forward KL if the policy itself uses none."""
    match settings:
        case AdaSwitch():
            return settings.divergence
        case Decay():
            return JSD()
        case _:
            return ForwardKL()
