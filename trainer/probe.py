"""The probe after a weight sync: do learner and student engine still say the same? If not, which parameters are old?

A sync that goes wrong raises nothing: a head that was left out, a stale prefix cache or a wrong dtype shows only in the
engine's log-probs. So they are compared with the learner's on fixed texts. Knows neither vLLM nor Ray.

n = tokens of a text, k = length of the engine's top list, V = vocabulary. Row j of a text belongs to position j + 1:
the distribution of that token given tokens 0..j. The last row is the token to come.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from common.sequence import Floats, Ids, TopLogprobs
from trainer.lora import parameters_for
from trainer.pretrained import hidden_states
from trainer.sharding import whole

EVERY_PARAMETER = "every parameter"


class WeightSyncError(RuntimeError):
    """Learner and student engine don't hold the same weights, or can't be brought to. Stops the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Where engine and learner differ most."""

    max_difference: float  # nats, absolute; inf where the engine's row is not known
    text_index: int
    position: int  # of the token in its text
    token_id: int
    engine_logprob: float  # nats
    learner_logprob: float  # nats
    num_compared: int  # log-probs in all texts

    def __str__(self) -> str:
        return (
            f"{self.max_difference:.3g} nats (token {self.token_id} at position {self.position} of probe text "
            f"{self.text_index}: engine {self.engine_logprob:.4f}, learner {self.learner_logprob:.4f})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The parameter group whose previous values explain the engine best."""

    group: str  # "lm_head.weight", "model.layers.3", EVERY_PARAMETER
    max_difference: float  # nats that remain between engine and learner with this group put back


def compare_probe(engine_rows: list[TopLogprobs], learner_logprobs: list[Floats]) -> ProbeReport:
    """The largest difference over all texts. Both lists hold one [n, k] array per text, for the engine's ids."""
    assert engine_rows, "a probe needs at least one text"
    reports = [
        _compare_text(text_index, rows, logprobs)
        for text_index, (rows, logprobs) in enumerate(zip(engine_rows, learner_logprobs, strict=True))
    ]
    worst = max(reports, key=lambda report: report.max_difference)
    return ProbeReport(
        max_difference=worst.max_difference,
        text_index=worst.text_index,
        position=worst.position,
        token_id=worst.token_id,
        engine_logprob=worst.engine_logprob,
        learner_logprob=worst.learner_logprob,
        num_compared=sum(report.num_compared for report in reports),
    )


def _compare_text(text_index: int, rows: TopLogprobs, learner_logprobs: Floats) -> ProbeReport:
    assert rows.logprobs.shape == learner_logprobs.shape, (rows.logprobs.shape, learner_logprobs.shape)
    differences = np.abs(rows.logprobs - learner_logprobs)
    differences = np.where(np.isnan(differences), np.inf, differences)  # unknown is not equal
    row, rank = np.unravel_index(differences.argmax(), differences.shape)
    return ProbeReport(
        max_difference=float(differences[row, rank]),
        text_index=text_index,
        position=int(row) + 1,
        token_id=int(rows.token_ids[row, rank]),
        engine_logprob=float(rows.logprobs[row, rank]),
        learner_logprob=float(learner_logprobs[row, rank]),
        num_compared=differences.size,
    )


@torch.no_grad()
def read_probe(
    model: PreTrainedModel,
    texts: Sequence[Ids],
    engine_rows: Sequence[TopLogprobs],
    previous: Mapping[str, Tensor] | None = None,
) -> list[Floats]:
    """The model's own log-probs, nats, [n, k] per text, of the ids in the engine's rows.

    With ``previous``, as if these parameters had these values, one by one: a tied head and its embedding are apart
    here, as they are in an engine; then no part of the model may be split over ranks. It is left as it is.
    """
    device = model.device
    was_training = model.training
    model.eval()
    try:
        return [
            _read_text(model, torch.from_numpy(text).long().to(device), rows, previous or {})
            for text, rows in zip(texts, engine_rows, strict=True)
        ]
    finally:
        model.train(was_training)


def _read_text(model: PreTrainedModel, text_n: Tensor, rows: TopLogprobs, previous: Mapping[str, Tensor]) -> Floats:
    assert len(rows) == text_n.numel(), f"expected a row for each of positions 1..{text_n.numel()}, got {len(rows)}"
    if previous:
        inputs = {"input_ids": text_n[None], "use_cache": False}
        answer: Any = functional_call(model, dict(previous), kwargs=inputs, tie_weights=False)
        logits_nV = answer.logits[0]
    else:
        head = model.get_output_embeddings()
        bias_V = None if head.bias is None else whole(head.bias)
        hidden_nH = hidden_states(model, text_n[None], torch.ones_like(text_n)[None])[0]
        logits_nV = nn.functional.linear(hidden_nH, whole(head.weight), bias_V)
    logprobs_nV = logits_nV.float().log_softmax(dim=-1)
    ids_nk = torch.from_numpy(rows.token_ids).long().clamp(min=0).to(text_n.device)  # -1 in unknown rows
    logprobs: Floats = logprobs_nV.gather(1, ids_nk).cpu().numpy()
    return logprobs


def parameter_group(name: str) -> str:
    """The group to look at: the layer for a parameter of a layer, else the parameter itself."""
    segments = name.split(".")
    layer = next((i for i, segment in enumerate(segments) if segment.isdigit()), None)
    return name if layer is None else ".".join(segments[: layer + 1])


def diagnose(
    model: PreTrainedModel, previous: Mapping[str, Tensor], texts: Sequence[Ids], engine_rows: list[TopLogprobs]
) -> Diagnosis:
    """Which group, put back to its ``previous`` values (all names, tied ones included), explains the engine best.

    Tries each group alone and all together: one forward pass over the texts for each.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    candidates: dict[str, dict[str, Tensor]] = {EVERY_PARAMETER: {}}
    for name, parameter in parameters.items():
        old_value = previous[name].to(dtype=parameter.dtype, device=parameter.device)
        candidates.setdefault(parameter_group(name), {})[name] = old_value
        candidates[EVERY_PARAMETER][name] = old_value
    remaining = {
        group: compare_probe(engine_rows, read_probe(model, texts, engine_rows, old_values)).max_difference
        for group, old_values in candidates.items()
    }
    best = min(remaining, key=lambda group: remaining[group])
    return Diagnosis(group=best, max_difference=remaining[best])


def check_sync(
    model: PreTrainedModel,
    read_previous: Callable[[], Mapping[str, Tensor] | None],
    texts: Sequence[Ids],
    engine_rows: list[TopLogprobs],
    *,
    tolerance: float,
    whole_copy: Callable[[], PreTrainedModel | None] | None = None,
) -> ProbeReport:
    """WeightSyncError if the engine's rows are more than ``tolerance`` nats from the learner's, naming the group.

    ``read_previous`` gives the weights before this sync, or None where they are not kept; ``whole_copy`` the model with
    no part of it split, None on learner ranks above 0; by default it is whole. Both are called only on a difference.
    """
    report = compare_probe(engine_rows, read_probe(model, texts, engine_rows))
    if report.max_difference <= tolerance:
        return report
    found = f"student engine and learner differ by {report}, expected at most {tolerance:g}"
    unsplit, previous = whole_copy() if whole_copy is not None else model, read_previous()
    if unsplit is None or previous is None:
        raise WeightSyncError(f"{found}; the previous weights are not kept, so no parameter group can be named")
    diagnosis = diagnose(unsplit, parameters_for(unsplit, previous), texts, engine_rows)
    if diagnosis.max_difference <= max(tolerance, 0.1 * report.max_difference):
        raise WeightSyncError(
            f"{found}; student engine behaves as if {diagnosis.group} had kept its old values "
            f"(that leaves {diagnosis.max_difference:.3g} nats)"
        )
    raise WeightSyncError(
        f"{found}; no one parameter group's old values explain it "
        f"({diagnosis.group} comes closest and leaves {diagnosis.max_difference:.3g} nats)"
    )
