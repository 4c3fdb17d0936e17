"""The probe around a weight sync: does the student engine hold the weights it was sent? If not, which are old?

A sync that goes wrong raises nothing: a head that was left out, a stale prefix cache or a wrong dtype shows only in the
engine's log-probs. So they are compared with the learner's on a few texts, in two ways:

- how far they are apart, against what they differed by at the start, where both held the same weights;
- how they changed, against how the learner's changed: read before the step and again after the sync.

The first catches what is far off, the second an engine that missed one step. Knows neither vLLM nor Ray.
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

FLOAT32_TOLERANCE = 1e-3  # nats, each difference, where the engine computes in float32
NOISE_FACTOR = 4.0  # how far the differences may grow over those at the start; see docs/decisions/2026-11-27-probe.md
NUM_POOLED = 32  # syncs that are judged together where one shows too little
MAX_NOISE = 0.5  # nats, rms, at the start: more than rounding in half precision ever made of one model


class WeightSyncError(RuntimeError):
    """Learner and student engine don't hold the same weights, or can't be brought to. Stops the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLimits:
    """What engine and learner may differ by. Nats."""

    rms: float = float("inf")
    p99: float = float("inf")
    max_difference: float = float("inf")

    @classmethod
    def choose(cls, *, tolerance: float | None, in_float32: bool, noise: ProbeNoise | None) -> "ProbeLimits":
        """``tolerance`` is the user's, of the rms. The engine computes in float32, as the learner reads in any case, or
        rounds, by a ``noise`` that is None until it has been measured.
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
class _Before:
    """What one engine and the learner said of the probe texts before the step."""

    rows: Sequence[TopLogprobs]
    learner: list[Floats]  # [n, k] nats, of the rows' ids
    output_rows: OutputRows  # the learner's, of the rows' ids

    @property
    def noise(self) -> list[TopLogprobs]:
        """Of the rows' ids, nats: what the engine's rounding makes of the same weights."""
        return [
            TopLogprobs(rows.token_ids, rows.logprobs - learner)
            for rows, learner in zip(self.rows, self.learner, strict=True)
        ]


class SyncProbe:
    """A learner rank's side of the probe. Every rank calls every method, with the same arguments.

    ``rows_of_engines`` are each student engine's rows of all texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        whole_copy: Callable[[], PreTrainedModel | None] | None = None,
        *,
        engine_dtype: torch.dtype = torch.float32,
    ) -> None:
        """``whole_copy`` gives the model with no part of it split, None on ranks above 0; by default it is whole.
        ``engine_dtype`` is what the engines round the weights to.
        """
        self.engine_dtype = engine_dtype
        self._model = model
        self._whole_copy = whole_copy or (lambda: model)
        self._texts: list[Ids] = []
        self._syncs: dict[int, deque[Followed]] = {}  # by engine
        self._before: list[_Before] = []  # one an engine, of these texts

    def measure_noise(
        self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]], limits: ProbeLimits
    ) -> ProbeNoise:
        """What the engines differ by now, where they are known to hold the learner's weights; that of the one that
        differs most. Raises WeightSyncError if that is beyond the limits: then they are not the same model.
        """
        with rounded_to(self._model, self.engine_dtype):
            logprobs, _ = self._read(texts, rows_of_engines)
        worst = max(map(compare_probe, rows_of_engines, logprobs), key=lambda report: report.rms)
        if not limits.allow(worst):
            raise WeightSyncError(
                f"student engine and learner differ before any training: {worst}, expected {limits}; vLLM and "
                "transformers read models.student differently, by engines.student or by its architecture; "
                "sync.probe_tolerance allows more"
            )
        return ProbeNoise(rms=worst.rms, p99=worst.p99)

    def read_before(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None:
        """Remember what both sides say before the step whose sync is to be checked."""
        if self.engine_dtype != torch.float32 and adapted_layers(self._model):
            return  # engines round the sum of weights and adapters, which the model does not hold
        with rounded_to(self._model, self.engine_dtype):
            logprobs, _ = self._read(texts, rows_of_engines)
            self._before = [
                _Before(rows=rows, learner=learner, output_rows=OutputRows.copy(self._model, _ids(rows)))
                for rows, learner in zip(rows_of_engines, logprobs, strict=True)
            ]
        self._texts = list(texts)

    def check(
        self,
        texts: Sequence[Ids],
        rows_of_engines: Sequence[Sequence[TopLogprobs]],
        limits: ProbeLimits,
        read_previous: Callable[[], Mapping[str, Tensor] | None] = lambda: None,
    ) -> ProbeReport:
        """The report of the engine that differs most. WeightSyncError for the first one that is beyond the limits or
        did not follow the learner, naming the parameters.

        ``read_previous`` gives the weights before this sync, or None where they are not kept. It is called, and the
        whole copy made, only to name parameters.
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
        is_same = len(texts) == len(self._texts) and all(map(np.array_equal, texts, self._texts))
        is_known = is_same and len(self._before) == len(rows_of_engines)
        befores = self._before if is_known else [None] * len(rows_of_engines)
        self._before = []
        logprobs, hidden = self._read(texts, [*rows_of_engines, *(it.rows for it in befores if it is not None)])
        reports = []
        for number, (rows, before) in enumerate(zip(rows_of_engines, befores, strict=True)):
            report = compare_probe(rows, logprobs[number])
            shares = None
            if before is not None:
                shares = self._followed(number, self._change(before, rows, logprobs[len(befores) + number], hidden))
                report = replace(
                    report, followed=_value(shares.everything), followed_output_layer=_value(shares.output_layer)
                )
            if (reason := _refusal(report, limits, shares)) is not None:
                name = "student engine" if len(rows_of_engines) == 1 else f"student engine {number}"
                explanation = self._explain(texts, rows, logprobs[number], before, shares, limits, read_previous)
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

    def _change(
        self, before: _Before, rows: Sequence[TopLogprobs], learner_now: list[Floats], hidden: list[Tensor]
    ) -> Change:
        """At the ids that the engine listed before."""
        ids = _ids(before.rows)
        output_layer = OutputRows.copy(self._model, ids).change_since(before.output_rows, hidden, ids)
        return Change(
            engine=together(map(logprobs_of, rows, ids)) - together([it.logprobs for it in before.rows]),
            learner=together(learner_now) - together(before.learner),
            output_layer=together(output_layer),
            noise=together([it.logprobs for it in before.noise]),
        )

    def _followed(self, engine: int, change: Change) -> Followed:
        """What this sync shows, and where that is too little, the last ones together."""
        now = followed(change)
        syncs = self._syncs.setdefault(engine, deque(maxlen=NUM_POOLED))
        syncs.append(now)
        return now.or_where_unknown(Followed.pooled(syncs))

    def _explain(
        self,
        texts: Sequence[Ids],
        rows: Sequence[TopLogprobs],
        learner: list[Floats],
        before: _Before | None,
        shares: Followed | None,
        limits: ProbeLimits,
        read_previous: Callable[[], Mapping[str, Tensor] | None],
    ) -> str:
        """Which parameters' old values are behind it, as far as can be told."""
        unsplit, previous = self._whole_copy(), read_previous()
        if unsplit is None or previous is None:
            return explain_by(shares, self._model)
        noise = None if before is None else list(map(logprobs_of, before.noise, [it.token_ids for it in rows]))
        try:
            old = parameters_for(unsplit, previous)
            return str(diagnose(unsplit, old, texts, rows, learner, noise, allowed_rms=limits.allowed_rms))
        except torch.OutOfMemoryError:
            return "there is no memory to try which parameters are old"


def _refusal(report: ProbeReport, limits: ProbeLimits, shares: Followed | None) -> str | None:
    """What is wrong with an engine; None where nothing is."""
    if not limits.allow(report):
        return f"and learner differ: {report}, expected {limits}"
    if shares is None:
        return None
    parts = {"": shares.everything, " by its output layer": shares.output_layer, " by its other layers": shares.rest}
    for part, share in parts.items():
        if share is not None and share.is_stale:
            return (
                f"did not follow the learner: of what the step changed{part} it made {share.value:.2f} "
                f"+- {share.standard_error:.2g}, expected 1"
            )
    return None


def _ids(rows: Sequence[TopLogprobs]) -> list[Ids]:
    return [it.token_ids for it in rows]


def _value(share: Share | None) -> float | None:
    """Of a share that tells anything."""
    return share.value if share is not None and share.is_known else None
