"""Finds the parameters that an engine has not loaded, by comparing the engine with the effect of their old values.

n = tokens of a text, k = length of the engine's list, N = all positions of all texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from common.sequence import Floats, Ids, TopLogprobs
from trainer.probe_reading import read_with
from trainer.probe_statistics import STANDARD_ERRORS, Followed, rms_of, share_of, together

EVERY_PARAMETER = "every parameter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The parameter group whose previous values explain the engine best."""

    group: str  # "lm_head.weight", "model.layers.3", EVERY_PARAMETER
    rms: float  # nats of difference that remain with the group's previous values
    is_cause: bool  # the group's previous values explain the difference almost completely

    def __str__(self) -> str:
        if self.is_cause:
            return f"it behaves as if {self.group} had kept its old values (that leaves {self.rms:.3g} nats, rms)"
        return (
            f"no one parameter group's old values explain it ({self.group} comes closest and leaves {self.rms:.3g} "
            "nats, rms)"
        )


def diagnose(
    model: PreTrainedModel,
    previous: Mapping[str, Tensor],
    texts: Sequence[Ids],
    rows: Sequence[TopLogprobs],
    learner: list[Floats],
    noise: list[Floats] | None = None,
    *,
    allowed_rms: float,
) -> Diagnosis:
    """The group whose ``previous`` values (under all names, including tied ones) explain the engine best.

    Tries each group alone and all together, with one forward pass over the texts for each. ``learner`` [n, k] is the
    learner's log-probs of the ids in ``rows``. ``noise`` [n, k] is the effect of the engine's rounding, NaN where it is
    unknown. ``allowed_rms`` is how much of a difference may remain if a group explains it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[str, list[str]] = {EVERY_PARAMETER: list(parameters)}
    for name in parameters:
        groups.setdefault(parameter_group(name), []).append(name)
    ids = [it.token_ids for it in rows]
    differences = together([it.logprobs for it in rows]) - together(learner)
    if noise is not None:
        differences = differences - together(noise)
    diagnoses = []
    for group, names in groups.items():
        old = {name: previous[name].to(dtype=parameters[name].dtype, device=model.device) for name in names}
        effect = together(read_with(model, old, texts, ids)) - together(learner)
        share = share_of(differences, effect)
        left = rms_of(differences - effect)
        is_mostly_explained = left <= 0.1 * rms_of(differences)
        if share is None:  # too few positions for a standard error
            is_cause = is_mostly_explained
        else:
            is_alike = abs(share.value - 1.0) <= max(0.25, STANDARD_ERRORS * share.standard_error)
            is_cause = is_alike and (is_mostly_explained or left <= allowed_rms)
        diagnoses.append(Diagnosis(group=group, rms=left, is_cause=is_cause))
    return min(diagnoses, key=lambda diagnosis: diagnosis.rms)


def parameter_group(name: str) -> str:
    """The group of a parameter: its layer if it is in one, else the parameter itself."""
    segments = name.split(".")
    layer = next((i for i, segment in enumerate(segments) if segment.isdigit()), None)
    return name if layer is None else ".".join(segments[: layer + 1])


def explain_by(shares: Followed | None, model: PreTrainedModel) -> str:
    """An explanation without the previous weights, from the shares that the engine followed."""
    nothing = "the previous weights are not kept, so no parameter group can be named"
    if shares is None or shares.everything is None:
        return nothing
    head = next(f"{name}.weight" for name, module in model.named_modules() if module is model.get_output_embeddings())
    if shares.everything.is_stale:
        return f"it behaves as if {EVERY_PARAMETER} had kept its old values"
    if shares.output_layer is not None and shares.output_layer.is_stale:
        return f"it behaves as if {head} had kept its old values"
    if shares.rest is not None and shares.rest.is_stale:
        return f"it behaves as if {EVERY_PARAMETER} but {head} had kept its old values"
    return nothing
