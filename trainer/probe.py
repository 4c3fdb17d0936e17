"""The probe at a weight sync: does the student engine hold the weights that it was sent, and if not, which are old?

A failed sync raises no error. A missing output layer, a stale prefix cache or a wrong dtype shows only in the engine's
log-probs. So the probe compares them with the learner's on a few texts, in two ways:

- the difference between the two, relative to the difference at the start, when both held the same weights;
- the change of the engine's log-probs over a step, relative to the change of the learner's.

The first finds large errors, the second an engine that missed one step. Does not depend on vLLM or Ray.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.sequence import Floats, Ids, TopLogprobs
from trainer.lora import adapted_layers, parameters_for
from trainer.probe_diagnosis import diagnose, explain_by
from trainer.probe_reading import OutputRows, read, rounded_to
from trainer.probe_statistics import (
    Change,
    Followed,
    ProbeNoise,
    ProbeReport,
    Share,
    compare_probe,
    followed,
    logprobs_of,
    together,
)

FLOAT32_TOLERANCE = 1e-3  # nats, for each difference, if the engine computes in float32
NOISE_FACTOR = 4.0  # allowed growth of the differences since the start; see docs/decisions/2026-11-27-probe.md
NUM_POOLED = 32  # number of syncs that are evaluated together if one is not conclusive
MAX_NOISE = 0.5  # nats, rms, at the start; rounding one model to half precision never made more


class WeightSyncError(RuntimeError):
    """Learner and student engine hold different weights, or the weights can't be sent. Stops the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLimits:
    """Maximum differences between engine and learner. Nats."""

    rms: float = float("inf")
    p99: float = float("inf")
    max_difference: float = float("inf")

    @classmethod
    def choose(cls, *, tolerance: float | None, in_float32: bool, noise: ProbeNoise | None) -> "ProbeLimits":
        """``tolerance`` is the user's limit for the rms. The learner always scores in float32. If the engine does too
        (``in_float32``), the limit is fixed, else it depends on ``noise``, which is None until it has been measured.
        """
        if tolerance is not None:
            return cls(rms=tolerance)
        if in_float32:
            return cls(max_difference=FLOAT32_TOLERANCE)
        if noise is None:
            return cls(rms=MAX_NOISE)
        return cls(rms=NOISE_FACTOR * noise.rms, p99=NOISE_FACTOR * noise.p99)

    @property
    def allowed_rms(self) -> float:
        return min(self.rms, self.max_difference)

    def allow(self, report: ProbeReport) -> bool:
        return report.rms <= self.rms and report.p99 <= self.p99 and report.max_difference <= self.max_difference

    def __str__(self) -> str:
        limits = {"rms": self.rms, "99% within": self.p99, "none above": self.max_difference}
        return ", ".join(f"{name} {limit:.3g}" for name, limit in limits.items() if limit < float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _EngineBefore:
    """Log-probs of one engine and the learner on the probe texts, before the step."""

    rows: Sequence[TopLogprobs]
    learner: list[Floats]  # [n, k] nats, for the ids in ``rows``

    @property
    def noise(self) -> list[TopLogprobs]:
        """Nats, for the ids in ``rows``: the engine's difference to the learner with the same weights."""
        return [
            TopLogprobs(rows.token_ids, rows.logprobs - learner)
            for rows, learner in zip(self.rows, self.learner, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """Everything that was read before the step."""

    texts: list[Ids]
    engines: list[_EngineBefore]
    output_rows: OutputRows  # the learner's, for the ids of all engines

    def fits(self, texts: Sequence[Ids], num_engines: int) -> bool:
        """Whether the same texts were read with as many engines."""
        is_same = len(texts) == len(self.texts) and all(map(np.array_equal, texts, self.texts))
        return is_same and len(self.engines) == num_engines


class SyncProbe:
    """The probe on one learner rank. Every rank calls every method, with the same arguments.

    ``rows_of_engines`` holds each student engine's rows of all texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        whole_copy: Callable[[], PreTrainedModel | None] | None = None,
        *,
        engine_dtype: torch.dtype = torch.float32,
    ) -> None:
        """``whole_copy`` returns the unsharded model, None on ranks above 0; by default ``model`` itself.
        ``engine_dtype`` is the dtype to which the engines round the weights.
        """
        self.engine_dtype = engine_dtype
        self._model = model
        self._whole_copy = whole_copy or (lambda: model)
        self._syncs: dict[int, deque[Followed]] = {}  # by engine
        self._before: _Before | None = None

    def measure_noise(
        self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]], limits: ProbeLimits
    ) -> ProbeNoise:
        """The difference of the engine that differs most, measured while all engines are known to hold the learner's
        weights. Raises WeightSyncError if it exceeds the limits, because the engine then does not compute the same
        model.
        """
        with rounded_to(self._model, self.engine_dtype):
            logprobs, _ = self._read(texts, rows_of_engines)
        worst = max(map(compare_probe, rows_of_engines, logprobs), key=lambda report: report.rms)
        if not limits.allow(worst):
            raise WeightSyncError(
                f"student engine and learner differ before any training: {worst}, expected {limits}; vLLM and "
                "transformers compute models.student differently, because of engines.student or its architecture; "
                "sync.probe_tolerance allows a larger difference"
            )
        return ProbeNoise(rms=worst.rms, p99=worst.p99)

    def read_before(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None:
        """Record the log-probs of both sides before a step whose sync will be checked."""
        if self.engine_dtype != torch.float32 and adapted_layers(self._model):
            return  # engines round the merged weights, which the model does not store
        with rounded_to(self._model, self.engine_dtype):
            logprobs, _ = self._read(texts, rows_of_engines)
            output_rows = OutputRows.copy(self._model, [ids for rows in rows_of_engines for ids in _ids(rows)])
        engines = [
            _EngineBefore(rows=rows, learner=learner) for rows, learner in zip(rows_of_engines, logprobs, strict=True)
        ]
        self._before = _Before(texts=list(texts), engines=engines, output_rows=output_rows)

    def check(
        self,
        texts: Sequence[Ids],
        rows_of_engines: Sequence[Sequence[TopLogprobs]],
        limits: ProbeLimits,
        read_previous: Callable[[], Mapping[str, Tensor] | None] = lambda: None,
    ) -> ProbeReport:
        """The report of the engine that differs most. Raises WeightSyncError for the first engine that exceeds the
        limits or did not follow the learner; the message names the parameters.

        ``read_previous`` returns the weights before this sync, or None if they are not kept. It is called, and the
        unsharded copy made, only to name parameters.
        """
        with rounded_to(self._model, self.engine_dtype):
            return self._check(texts, rows_of_engines, limits, read_previous)

    def _check(
        self,
        texts: Sequence[Ids],
        rows_of_engines: Sequence[Sequence[TopLogprobs]],
        limits: ProbeLimits,
        read_previous: Callable[[], Mapping[str, Tensor] | None],
    ) -> ProbeReport:
        before, self._before = self._before, None
        if before is not None and not before.fits(texts, len(rows_of_engines)):
            before = None
        engines = before.engines if before is not None else []
        logprobs, hidden = self._read(texts, [*rows_of_engines, *(it.rows for it in engines)])
        changes = [] if before is None else self._changes(before, rows_of_engines, logprobs[len(engines) :], hidden)
        reports = []
        for number, rows in enumerate(rows_of_engines):
            report = compare_probe(rows, logprobs[number])
            shares = None
            if changes:
                shares = self._followed(number, changes[number])
                report = replace(
                    report, followed=_value(shares.everything), followed_output_layer=_value(shares.output_layer)
                )
            if (reason := _refusal(report, limits, shares)) is not None:
                name = "student engine" if len(rows_of_engines) == 1 else f"student engine {number}"
                explanation = self._explain(
                    texts, rows, logprobs[number], engines[number] if engines else None, shares, limits, read_previous
                )
                raise WeightSyncError(f"{name} {reason}; {explanation}")
            reports.append(report)
        return max(reports, key=lambda report: report.rms)

    def _read(
        self, texts: Sequence[Ids], lists: Sequence[Sequence[TopLogprobs]]
    ) -> tuple[list[list[Floats]], list[Tensor]]:
        """Log-probs of each list's ids, in one pass over the texts, and the hidden states."""
        widths = [rows[0].k for rows in lists]
        ids = [np.concatenate([rows[text].token_ids for rows in lists], axis=1) for text in range(len(texts))]
        reading = read(self._model, texts, ids)
        of_texts = [np.split(logprobs, np.cumsum(widths)[:-1], axis=1) for logprobs in reading.logprobs]
        return [list(of_list) for of_list in zip(*of_texts, strict=True)], reading.hidden

    def _changes(
        self,
        before: _Before,
        rows_of_engines: Sequence[Sequence[TopLogprobs]],
        learner_now: list[list[Floats]],
        hidden: list[Tensor],
    ) -> list[Change]:
        """The changes over the step, for the ids that each engine listed before it."""
        output_rows = OutputRows.copy(self._model, [before.output_rows.token_ids])
        changes = []
        for engine, rows, learner in zip(before.engines, rows_of_engines, learner_now, strict=True):
            ids = _ids(engine.rows)
            changes.append(
                Change(
                    engine=together(map(logprobs_of, rows, ids)) - together([it.logprobs for it in engine.rows]),
                    learner=together(learner) - together(engine.learner),
                    output_layer=together(output_rows.change_since(before.output_rows, hidden, ids)),
                    noise=together([it.logprobs for it in engine.noise]),
                )
            )
        return changes

    def _followed(self, engine: int, change: Change) -> Followed:
        """The result of this sync, or of the last syncs together if this one is not conclusive."""
        now = followed(change)
        syncs = self._syncs.setdefault(engine, deque(maxlen=NUM_POOLED))
        syncs.append(now)
        return now.or_where_unknown(Followed.pooled(syncs))

    def _explain(
        self,
        texts: Sequence[Ids],
        rows: Sequence[TopLogprobs],
        learner: list[Floats],
        before: _EngineBefore | None,
        shares: Followed | None,
        limits: ProbeLimits,
        read_previous: Callable[[], Mapping[str, Tensor] | None],
    ) -> str:
        """The parameters whose old values explain the difference, as far as they can be determined."""
        unsplit, previous = self._whole_copy(), read_previous()
        if unsplit is None or previous is None:
            return explain_by(shares, self._model)
        noise = None if before is None else list(map(logprobs_of, before.noise, [it.token_ids for it in rows]))
        try:
            old = parameters_for(unsplit, previous)
            return str(diagnose(unsplit, old, texts, rows, learner, noise, allowed_rms=limits.allowed_rms))
        except torch.OutOfMemoryError:
            return "there is not enough memory to find out which parameters are old"


def _refusal(report: ProbeReport, limits: ProbeLimits, shares: Followed | None) -> str | None:
    """What is wrong with an engine; None if nothing is."""
    if not limits.allow(report):
        return f"and learner differ: {report}, expected {limits}"
    if shares is None:
        return None
    parts = {"": shares.everything, " in the output layer": shares.output_layer, " in the other layers": shares.rest}
    for part, share in parts.items():
        if share is not None and share.is_stale:
            return (
                f"did not follow the learner: its log-probs show {share.value:.2f} "
                f"+- {share.standard_error:.2g} of the step's change{part}, expected 1"
            )
    return None


def _ids(rows: Sequence[TopLogprobs]) -> list[Ids]:
    return [it.token_ids for it in rows]


def _value(share: Share | None) -> float | None:
    """The share's value, if it is conclusive."""
    return share.value if share is not None and share.is_known else None
