"""The probe after a sync, as tests ask it: one engine, one tolerance for every difference."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from common.sequence import Floats, Ids, TopLogprobs
from trainer.probe import ProbeLimits, SyncProbe
from trainer.probe_reading import read
from trainer.probe_statistics import ProbeReport


def check_sync(
    model: PreTrainedModel,
    read_previous: Callable[[], Mapping[str, Tensor] | None],
    texts: Sequence[Ids],
    rows: Sequence[TopLogprobs],
    *,
    tolerance: float,
) -> ProbeReport:
    """The report. Raises WeightSyncError where a log-prob differs by more than ``tolerance`` nats."""
    return SyncProbe(model).check(texts, [rows], ProbeLimits(max_difference=tolerance), read_previous)


def read_probe(model: PreTrainedModel, texts: Sequence[Ids], rows: Sequence[TopLogprobs]) -> list[Floats]:
    """[n, k] nats per text: what the model says of the rows' ids."""
    return read(model, texts, [each.token_ids for each in rows]).logprobs
