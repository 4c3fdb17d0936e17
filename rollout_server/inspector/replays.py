"""Replay: where would another policy have switched? The policies decide, this module counts and reports."""

from collections import Counter

import numpy as np
from fastapi import APIRouter

from common.config import SKD, AdaSwitch, Decay, Policy, Relay
from rollout_server.inspector import models
from rollout_server.inspector.problems import ProblemError, answers
from rollout_server.inspector.routes import QUERY_TIMEOUT_S, RunName, Store
from rollout_server.inspector.runs import RunFiles
from rollout_server.policies import divergence_of, make_policy
from rollout_server.traces import queries
from rollout_server.traces.records import SequenceFilter
from rollout_server.traces.replay import RecordedSequence, Replayed, replay

router = APIRouter(prefix="/api/v1")


@router.post("/runs/{run}/replay", responses=answers(404, 409, 503))
def replay_run(run: RunName, request: models.ReplayRequest, store: Store) -> models.ReplayReport:
    """Where a policy would have switched first, given the recorded divergences and ranks. No engine is used."""
    index = store.index(run, QUERY_TIMEOUT_S)
    _check_recording(request.policy, store.files(run))
    policy = make_policy(request.policy)
    where = SequenceFilter(first_step=request.first_step, last_step=request.last_step)
    judged = [
        _compared(sequence, replay(policy, sequence)) for sequence in queries.recorded(index, where, QUERY_TIMEOUT_S)
    ]
    return _report(request, judged)


def _check_recording(policy: Policy, files: RunFiles) -> None:
    """Reject a policy if the recording does not contain the values that it needs."""
    if isinstance(policy, AdaSwitch | Decay):
        wanted = divergence_of(policy)
        recorded = divergence_of(files.policy) if files.policy else None
        if recorded != wanted:
            known = f"{recorded.model_dump()}" if recorded else "unknown, because config.yaml can't be read"
            raise ProblemError(
                409,
                "divergence-mismatch",
                f"policy {policy.type} needs {wanted.model_dump()}; the recorded divergence is {known}",
            )
    if isinstance(policy, SKD | Relay) and (files.top_logprobs is None or policy.top_k > files.top_logprobs):
        length = files.top_logprobs or "unknown, because config.yaml can't be read"
        raise ProblemError(
            409,
            "list-too-short",
            f"policy.top_k must be <= the length of the recorded lists ({length}), got {policy.top_k}",
        )


def _compared(sequence: RecordedSequence, replayed: Replayed) -> models.ReplayedSequence:
    return models.ReplayedSequence(
        sequence_id=sequence.sequence_id,
        step=sequence.step,
        outcome=replayed.outcome,
        reason=replayed.reason,
        recorded_first_switch=sequence.first_switch,
        replayed_first_switch=replayed.first_switch,
    )


def _report(request: models.ReplayRequest, judged: list[models.ReplayedSequence]) -> models.ReplayReport:
    outcomes = Counter(sequence.outcome for sequence in judged)
    known = [sequence for sequence in judged if sequence.outcome != "unknown"]
    same = [s for s in known if s.recorded_first_switch == s.replayed_first_switch]
    before = [s.recorded_first_switch for s in judged if s.recorded_first_switch is not None]
    after = [s.replayed_first_switch for s in judged if s.replayed_first_switch is not None]
    num_earlier = sum(_is_earlier(sequence) for sequence in known)
    differences = [s for s in judged if s.outcome == "unknown" or s.recorded_first_switch != s.replayed_first_switch]
    return models.ReplayReport(
        policy=request.policy,
        num_sequences=len(judged),
        num_switch=outcomes["switch"],
        num_no_switch=outcomes["no_switch"],
        num_unknown=outcomes["unknown"],
        reasons=dict(Counter(sequence.reason for sequence in judged)),
        recorded_switch_rate=_share(len(before), len(judged)),
        switch_rate=_share(outcomes["switch"], len(known)),
        switch_rate_min=_share(outcomes["switch"], len(judged)),
        switch_rate_max=_share(outcomes["switch"] + outcomes["unknown"], len(judged)),
        mean_recorded_first_switch=float(np.mean(before)) if before else None,
        mean_first_switch=float(np.mean(after)) if after else None,
        recorded_histogram=_histogram(before, len(judged), request.bins),
        histogram=_histogram(after, len(judged), request.bins),
        num_earlier=num_earlier,
        num_same=len(same),
        num_later_or_never=len(known) - len(same) - num_earlier,
        differences=differences[: request.max_differences],
    )


def _is_earlier(sequence: models.ReplayedSequence) -> bool:
    recorded, replayed = sequence.recorded_first_switch, sequence.replayed_first_switch
    return replayed is not None and (recorded is None or replayed < recorded)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _histogram(positions: list[int], num_sequences: int, bins: int) -> models.Histogram:
    edges: list[float] = []
    counts: list[int] = []
    if positions:
        counts_array, edges_array = np.histogram(positions, bins, range=(0, max(*positions, 1)))
        counts, edges = counts_array.tolist(), edges_array.tolist()
    num_missing = num_sequences - len(positions)
    return models.Histogram(
        quantity="first_switch", edges=edges, counts=counts, num_values=len(positions), num_missing=num_missing
    )
