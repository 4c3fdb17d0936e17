"""The probe, with transformers in the engine's place: right weights, and some that missed a sync or a part of it."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.sequence import Ids, TopLogprobs
from trainer.probe import MAX_NOISE, NOISE_FACTOR, ProbeLimits, SyncProbe, WeightSyncError
from trainer.probe_diagnosis import EVERY_PARAMETER, diagnose, parameter_group
from trainer.probe_reading import in_float32, read, read_with
from trainer.probe_statistics import ProbeNoise, ProbeReport
from trainer.weight_sender import named_weights

VOCABULARY_SIZE = 128
K = 16
ANY = ProbeLimits(max_difference=1e9)
EXACT = ProbeLimits(max_difference=1e-3)
_RNG = np.random.default_rng(3)
TEXTS: list[Ids] = [_RNG.integers(0, VOCABULARY_SIZE, size=length).astype(np.int32) for length in (40, 33, 47)]

Weights = dict[str, Tensor]


def make_model(*, seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.15,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    return model


def take_step(model: LlamaForCausalLM, learning_rate: float) -> None:
    """One of AdamW, on the texts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for text in TEXTS:
        ids = torch.from_numpy(text).long()[None]
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def rows_of(model: nn.Module, old_values: Weights | None = None, texts: Sequence[Ids] = TEXTS) -> list[TopLogprobs]:
    """What an engine with these weights would return, its matrix products in their dtype."""
    engine = copy.deepcopy(model)
    if old_values is not None:
        engine.lm_head.weight = nn.Parameter(engine.lm_head.weight.detach().clone())  # an engine keeps it apart
        parameters = dict(engine.named_parameters())
        for name, value in old_values.items():
            parameters[name].data.copy_(value)
    rows = []
    with torch.no_grad():
        for text in texts:
            logits = engine(input_ids=torch.from_numpy(text).long()[None]).logits[0]
            top = logits.float().log_softmax(-1).topk(K)
            rows.append(TopLogprobs(top.indices.int().numpy(), top.values.numpy()))
    return rows


class Synced:
    """A learner and engines around one step."""

    def __init__(self, *, learning_rate: float, dtype: torch.dtype, tied: bool = True) -> None:
        self.model = make_model(tied=tied)
        self.dtype = dtype
        self.probe = SyncProbe(self.model)
        self.before = {name: tensor.clone() for name, tensor in named_weights(self.model).items()}
        self.noise = self.probe.measure_noise(TEXTS, [self.rows()], ProbeLimits(rms=MAX_NOISE))
        self.probe.read_before(TEXTS, [self.rows()])
        take_step(self.model, learning_rate)

    @property
    def limits(self) -> ProbeLimits:
        return ProbeLimits.choose(tolerance=None, in_float32=self.dtype == torch.float32, noise=self.noise)

    def rows(self, is_old: Callable[[str], bool] = lambda name: False) -> list[TopLogprobs]:
        """Of an engine in which these weights are old."""
        old = {name: tensor for name, tensor in self.before.items() if is_old(name)}
        return rows_of(copy.deepcopy(self.model).to(self.dtype), old)

    def check(self, rows: list[TopLogprobs], *, keeps_previous: bool = True) -> ProbeReport:
        return self.probe.check(TEXTS, [rows], self.limits, lambda: self.before if keeps_previous else None)


# -------------------------------------------------------------------------------------------------- around one step


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_engine_that_took_the_weights_passes(dtype: torch.dtype, learning_rate: float) -> None:
    synced = Synced(learning_rate=learning_rate, dtype=dtype)
    report = synced.check(synced.rows())
    assert report.num_compared == K * sum(text.size for text in TEXTS)
    if dtype == torch.float32 or learning_rate >= 1e-4:
        assert report.followed == pytest.approx(1.0, abs=1e-3 if dtype == torch.float32 else 0.25)
    else:  # rounding moves the log-probs by far more than the step does
        assert report.followed is None


@pytest.mark.parametrize("keeps_previous", [True, False])
@pytest.mark.parametrize(
    ("dtype", "learning_rate"),
    [(torch.float32, 1e-7), (torch.bfloat16, 1e-2), (torch.bfloat16, 1e-4), (torch.float16, 1e-5)],
)
def test_an_engine_that_is_one_sync_old_is_refused(
    dtype: torch.dtype, learning_rate: float, keeps_previous: bool
) -> None:
    synced = Synced(learning_rate=learning_rate, dtype=dtype)
    refused = f"behaves as if {EVERY_PARAMETER} had kept its old values"
    with pytest.raises(WeightSyncError, match=refused):
        synced.check(synced.rows(lambda name: True), keeps_previous=keeps_previous)


def test_what_a_small_step_changes_is_less_than_rounding_and_is_told_from_it() -> None:
    """The limits alone would let it pass."""
    synced = Synced(learning_rate=1e-4, dtype=torch.bfloat16)
    with pytest.raises(WeightSyncError, match=r"did not follow the learner: its log-probs show 0\.00"):
        synced.check(synced.rows(lambda name: True))
    unread = SyncProbe(synced.model)
    assert synced.limits.allow(unread.check(TEXTS, [synced.rows(lambda name: True)], synced.limits))


@pytest.mark.parametrize("keeps_previous", [True, False])
@pytest.mark.parametrize(("dtype", "learning_rate"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("tied", [True, False])
def test_an_engine_whose_output_layer_is_one_sync_old_is_refused(
    tied: bool, dtype: torch.dtype, learning_rate: float, keeps_previous: bool
) -> None:
    synced = Synced(learning_rate=learning_rate, dtype=dtype, tied=tied)
    rows = synced.rows(lambda name: name == "lm_head.weight")
    with pytest.raises(WeightSyncError, match=r"behaves as if lm_head\.weight had kept its old values"):
        synced.check(rows, keeps_previous=keeps_previous)


@pytest.mark.parametrize("group", ["model.embed_tokens.weight", "model.layers.1", "model.norm.weight"])
def test_the_group_that_kept_its_old_values_is_named(group: str) -> None:
    synced = Synced(learning_rate=1e-2, dtype=torch.float32)
    with pytest.raises(WeightSyncError, match=f"behaves as if {group} had kept its old values"):
        synced.check(synced.rows(lambda name: parameter_group(name) == group))


def test_a_difference_that_no_old_values_explain_accuses_nobody() -> None:
    synced = Synced(learning_rate=1e-2, dtype=torch.float32)
    with pytest.raises(WeightSyncError, match="no one parameter group's old values explain it"):
        synced.check(rows_of(make_model(seed=5)))


def test_each_engine_is_held_against_the_learner_and_the_one_that_is_old_is_named() -> None:
    synced = Synced(learning_rate=1e-2, dtype=torch.float32)
    old = synced.rows(lambda name: True)
    synced.probe.read_before(TEXTS, [old, old])
    with pytest.raises(WeightSyncError, match=r"^student engine 1 "):
        synced.probe.check(TEXTS, [synced.rows(), old], synced.limits)


def test_the_report_is_that_of_the_engine_that_differs_most() -> None:
    model = make_model()
    rows, coarse = rows_of(model), rows_of(copy.deepcopy(model).bfloat16())
    report = SyncProbe(model).check(TEXTS, [rows, coarse, rows], ANY)
    assert report.rms == SyncProbe(model).check(TEXTS, [coarse], ANY).rms > 1e-3


def test_what_was_read_of_other_texts_or_before_an_earlier_step_counts_for_nothing() -> None:
    synced = Synced(learning_rate=1e-2, dtype=torch.float32)
    assert synced.probe.check(TEXTS[:2], [synced.rows()[:2]], EXACT).followed is None
    assert synced.check(synced.rows()).followed is None


def test_a_row_the_engine_does_not_know_is_not_taken_for_equal() -> None:
    synced = Synced(learning_rate=1e-4, dtype=torch.bfloat16)
    rows = synced.rows()
    rows[1] = TopLogprobs.unknown(TEXTS[1].size, K)
    with pytest.raises(WeightSyncError, match="inf nats"):
        synced.check(rows)


# --------------------------------------------------------------------------------------------------- before any step


def test_noise_is_what_rounding_makes_of_the_same_weights() -> None:
    model = make_model()
    noise = {
        dtype: SyncProbe(model).measure_noise(
            TEXTS, [rows_of(copy.deepcopy(model).to(dtype))], ProbeLimits(rms=MAX_NOISE)
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert (
        noise[torch.float32].rms
        < 1e-5
        < noise[torch.float16].rms
        < noise[torch.bfloat16].rms
        < noise[torch.bfloat16].p99
    )


def test_an_engine_that_runs_another_model_is_refused_before_any_step() -> None:
    with pytest.raises(WeightSyncError, match=r"^student engine and learner differ before any training: rms"):
        SyncProbe(make_model()).measure_noise(TEXTS, [rows_of(make_model(seed=5))], ProbeLimits(rms=MAX_NOISE))


def test_limits_are_the_user_s_or_exact_in_float32_or_a_multiple_of_the_noise() -> None:
    noise = ProbeNoise(rms=0.1, p99=0.3)
    chosen = ProbeLimits.choose(tolerance=None, in_float32=False, noise=noise)
    assert (chosen.rms, chosen.p99) == pytest.approx((NOISE_FACTOR * 0.1, NOISE_FACTOR * 0.3))
    assert ProbeLimits.choose(tolerance=None, in_float32=True, noise=noise) == EXACT
    assert ProbeLimits.choose(tolerance=0.7, in_float32=True, noise=noise) == ProbeLimits(rms=0.7)
    assert ProbeLimits.choose(tolerance=None, in_float32=False, noise=None) == ProbeLimits(rms=MAX_NOISE)


@pytest.mark.parametrize("statistic", ["rms", "p99", "max_difference"])
def test_each_limit_refuses(statistic: str) -> None:
    model = make_model()
    rows = rows_of(copy.deepcopy(model).bfloat16())
    found = getattr(SyncProbe(model).check(TEXTS, [rows], ANY), statistic)
    SyncProbe(model).check(TEXTS, [rows], ProbeLimits(**{statistic: found}))
    with pytest.raises(WeightSyncError, match=f"expected .* {0.99 * found:.3g}"):
        SyncProbe(model).check(TEXTS, [rows], ProbeLimits(**{statistic: 0.99 * found}))


# -------------------------------------------------------------------------------------------------- how it is read


def test_the_learner_reads_a_row_for_the_token_that_follows_it() -> None:
    model = make_model()
    ids = [np.tile(np.arange(VOCABULARY_SIZE, dtype=np.int32), (text.size, 1)) for text in TEXTS]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(TEXTS[0]).long()[None]).logits[0]
    np.testing.assert_allclose(read(model, TEXTS, ids).logprobs[0], logits.log_softmax(-1).numpy(), atol=1e-5)
    assert [logprobs.shape for logprobs in read(model, TEXTS, ids).logprobs] == [it.shape for it in ids]


def half_only(module: nn.Module, query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
    """Knows half precision alone, as flash attention does."""
    if query.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return sdpa_attention_forward(module, query, *args, **kwargs)


def test_a_learner_that_trains_with_flash_attention_is_probed_in_float32() -> None:
    AttentionInterface.register("half_only", half_only)
    model = make_model()
    rows = rows_of(model)
    model.set_attn_implementation("half_only")
    with pytest.raises(RuntimeError, match="FlashAttention"):
        rows_of(model)
    assert SyncProbe(model).check(TEXTS, [rows], EXACT).max_difference < 1e-5
    assert model.config._attn_implementation == "half_only"


def test_reading_leaves_the_model_and_the_precision_as_they_were() -> None:
    model = make_model().train()
    now = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with in_float32(model):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not model.training
        ids = [row.token_ids for row in rows_of(model)]
        read_with(model, {name: tensor + 1.0 for name, tensor in now.items()}, TEXTS, ids)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert model.training
    assert all(torch.equal(tensor, now[name]) for name, tensor in named_weights(model).items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_diagnosis_finds_what_is_old_through_rounding() -> None:
    """By what the engine differs by beyond what it differed by before the step."""
    synced = Synced(learning_rate=1e-3, dtype=torch.bfloat16)
    rows = synced.rows(lambda name: parameter_group(name) == "model.layers.2")
    ids = [row.token_ids for row in rows]
    learner = read(synced.model, TEXTS, ids).logprobs
    diagnosis = diagnose(synced.model, synced.before, TEXTS, rows, learner, allowed_rms=synced.limits.rms)
    assert diagnosis.group == "model.layers.2"
