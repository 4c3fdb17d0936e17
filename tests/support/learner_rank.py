"""One rank of a learner in a process of its own: ``python -m tests.support.learner_rank FOLDER RANK RANKS HOST:PORT``.

Runs every case in FOLDER/cases.pkl and leaves what this rank saw in FOLDER/seen-RANK.pkl. Not a test: test_ranks.py
starts it and looks.
"""

import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.config import Trainer
from common.sequence import MixedSequence, TopLogprobs
from common.weights import WeightUpdate
from trainer.learner import Learner, StepReport, learner_device
from trainer.probe import ProbeLimits, SyncProbe, WeightSyncError
from trainer.probe_reading import read
from trainer.ranks import join
from trainer.sharding import whole
from trainer.weight_sender import LearnerWeights, OneCallClient, build_sender


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A learner, and the sequences of its two steps."""

    student: str
    config: Trainer
    sequences: list[MixedSequence]
    save_to: Path | None = None  # then a third step, a sync, probes, saves and a fourth step follow
    dies: bool = False  # rank 1, before the first step


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a rank saw of a case."""

    reports: list[StepReport]
    gradients: dict[str, Tensor]  # of the first step, gathered
    parts: dict[str, tuple[int, int]]  # numbers a rank holds of a parameter, and numbers in all
    error: str | None
    sent: dict[str, Tensor]  # what an engine would have read after the steps; rank 0
    weights: dict[str, Tensor]  # after the steps, gathered
    probes: list[str]  # what became of a probe with an engine's right rows, and of one with rows of old weights
    resumed_otherwise: list[str] | None  # parameters that a learner which went on from a checkpoint has otherwise


def run(case: Case, ranks: Any) -> Seen:
    learner = Learner(case.student, case.config, seed=0, ranks=ranks)
    if case.dies and ranks.rank == 1:
        os._exit(1)
    gradients: dict[str, Tensor] = {}

    def catch(*_: object) -> None:
        gradients.update({name: whole(p.grad).cpu() for name, p in learner.model.named_parameters()})

    handle = learner.optimizer.register_step_pre_hook(catch)
    reports: list[StepReport] = []
    error = None
    try:
        reports.append(learner.step(case.sequences))
        handle.remove()
        reports.append(learner.step(case.sequences[::-1]))
    except (FloatingPointError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    parts = {
        name: (p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel())
        for name, p in learner.model.named_parameters()
    }
    sent, weights, probes = _exports(learner, case) if case.save_to is not None else ({}, {}, [])
    return Seen(
        reports=reports,
        gradients=gradients,
        parts=parts,
        error=error,
        sent=sent,
        weights=weights,
        probes=probes,
        resumed_otherwise=_resumed_otherwise(learner, case, case.save_to) if case.save_to is not None else None,
    )


def _exports(learner: Learner, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """One more step, sync, probe against the rows of the new weights and of the old ones, save."""
    sent: dict[str, Tensor] = {}

    def load(update: WeightUpdate) -> None:
        sent.update(load_file(str(update.transfer_info["path"])))

    client = OneCallClient(init=lambda _: None, load=load)
    source = LearnerWeights(learner.model, dtype=torch.float32)
    sender = build_sender("host_memory", source, client, rank=learner.ranks.rank)
    texts, stale = [sequence.token_ids for sequence in case.sequences], _rows(learner, case)
    probe = SyncProbe(learner.model, learner.whole_copy)
    probe.read_before(texts, [stale])
    learner.step(case.sequences)
    sender.send(1)
    probes = []
    for rows in (_rows(learner, case), stale):
        try:
            report = probe.check(texts, [rows], ProbeLimits(max_difference=1e-4), sender.previous_weights)
            probes.append(f"{report.max_difference:.0e} {report.followed:.3f} {report.followed_output_layer:.3f}")
        except WeightSyncError as error:
            probes.append(str(error))
    assert case.save_to is not None
    learner.save(case.save_to)
    sender.shutdown()
    weights = {name: whole(p.detach()).cpu() for name, p in learner.model.named_parameters()}
    return sent, weights, probes


def _resumed_otherwise(learner: Learner, case: Case, save_to: Path) -> list[str]:
    """Store the state; take a step here, and one in a new learner that goes on from it; name what differs in a bit."""
    state = save_to.with_name(f"{save_to.name} state")
    learner.save_state(state)
    learner.step(case.sequences[::-1])
    resumed = Learner(case.student, case.config, seed=0, ranks=learner.ranks)
    resumed.load_state(state)
    resumed.step(case.sequences[::-1])
    found = dict(resumed.model.named_parameters())
    return [
        name for name, p in learner.model.named_parameters() if not torch.equal(whole(found[name]), whole(p.detach()))
    ]


def _rows(learner: Learner, case: Case) -> list[TopLogprobs]:
    """What an engine with the learner's present weights would say."""
    texts = [sequence.token_ids for sequence in case.sequences]
    ids = [sequence.teacher_top.token_ids for sequence in case.sequences]
    reading = read(learner.model, texts, ids)
    return [TopLogprobs(token_ids, logprobs) for token_ids, logprobs in zip(ids, reading.logprobs, strict=True)]


def main(folder: Path, rank: int, num_ranks: int, address: str) -> None:
    cases: dict[str, Case] = pickle.loads((folder / "cases.pkl").read_bytes())
    ranks = join(rank, num_ranks, address, learner_device(), timeout_s=60)
    seen = {}
    for name, case in cases.items():
        seen[name] = run(case, ranks)
    (folder / f"seen-{rank}.pkl").write_bytes(pickle.dumps(seen))


if __name__ == "__main__":
    from tests.support import learner_rank  # what is pickled belongs to the module and not to this script

    learner_rank.main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
