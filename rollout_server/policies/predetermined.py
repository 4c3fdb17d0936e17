"""Policies that decide before the first token: on-policy, off-policy, fixed, mixture, dataset."""

from common.config import Mixture
from common.seeds import derive_seed
from common.sequence import Floats
from rollout_server.policies.protocol import Decision, ScoredPositions, no_thresholds


class Predetermined:
    """A policy whose switch position is fixed in advance. The teacher generates from there to the end."""

    guidance_tokens = None

    def may_switch_after(self, num_switches: int) -> bool:
        return False

    def uses_dataset_answer(self, sequence_seed: int) -> bool:
        return False

    def decide(self, scored: ScoredPositions) -> Decision:
        return Decision(thresholds=no_thresholds(scored), switch=None)

    def switch_is_likely(self, divergences: Floats) -> bool:
        return False


class FixedPolicy(Predetermined):
    """Switches at one position: none for on-policy, 0 for off-policy."""

    def __init__(self, position: int | None) -> None:
        self._position = position

    def exploration_limit(self, sequence_seed: int) -> int | None:
        return self._position


class DatasetPolicy(FixedPolicy):
    """Always uses the dataset answer."""

    def __init__(self) -> None:
        super().__init__(None)

    def uses_dataset_answer(self, sequence_seed: int) -> bool:
        return True


class MixturePolicy(Predetermined):
    """GKD (arXiv 2306.13649): with probability 1 - lambda the teacher from position 0, or the dataset answer."""

    def __init__(self, settings: Mixture) -> None:
        self._settings = settings

    def uses_dataset_answer(self, sequence_seed: int) -> bool:
        return self._settings.rest == "dataset" and not self._is_students(sequence_seed)

    def exploration_limit(self, sequence_seed: int) -> int | None:
        return None if self._is_students(sequence_seed) else 0

    def _is_students(self, sequence_seed: int) -> bool:
        draw = derive_seed(sequence_seed, "mixture") / 2**63
        return draw < self._settings.student_share
