"""Switch policies: at which proposed position does the teacher take over? Pure functions of the scored positions.

A policy never calls an engine and never reads the run's configuration beyond its own settings. What it decides depends
only on what lies at and before a position, so judging a finished sequence gives the same switch as judging it chunk by
chunk ("online equals post hoc"). One module per method; a new one is a class, its settings in ``common/config`` and a
line in the table below.
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
    """The policy of these settings."""
    return _POLICIES[type(settings)](settings)


def divergence_of(settings: Policy) -> Divergence:
    """What the verifier computes for this policy. Forward KL where the policy itself looks at no divergence."""
    match settings:
        case AdaSwitch():
            return settings.divergence
        case Decay():
            return JSD()
        case _:
            return ForwardKL()
