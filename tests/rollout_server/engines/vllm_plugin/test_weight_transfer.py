"""New weights into a real vLLM engine on this machine's processor: a tiny random model, tied, in float32."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from common.sequence import Ids, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.vllm_plugin.weight_transfer import (
    HOST_MEMORY,
    UpdateRefused,
    apply_update,
    init_transfer,
    register,
)
from tests.support.probing import check_sync, read_probe
from trainer.probe import WeightSyncError
from trainer.probe_statistics import compare_probe
from trainer.weight_files import write_safetensors
from trainer.weight_sender import LearnerWeights, OneCallClient, WeightSender, build_sender

VOCABULARY_SIZE = 64
MAX_MODEL_LEN = 512
TIMEOUT_S = 60.0
TEXTS: list[Ids] = [np.arange(1, 42, dtype=np.int32), np.array([7, 7, 60, 3], np.int32)]

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return LlamaForCausalLM(config).eval()


def move_weights(model: LlamaForCausalLM, *, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The learner's model. Tests move its weights on and send them; the engine must follow."""
    return make_model()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncLLM]:
    folder = tmp_path_factory.mktemp("student")
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(folder),
                skip_tokenizer_init=True,
                dtype="float32",
                enforce_eager=True,
                block_size=32,
                max_model_len=MAX_MODEL_LEN,
                max_num_batched_tokens=MAX_MODEL_LEN,
                max_num_seqs=8,
                max_logprobs=VOCABULARY_SIZE,
                enable_chunked_prefill=False,
                enable_prefix_caching=True,
                weight_transfer_config=WeightTransferConfig(backend=HOST_MEMORY),
            )
        )
    yield engine
    engine.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sender(model: LlamaForCausalLM, engine: AsyncLLM) -> AsyncIterator[WeightSender]:
    """The learner's half, reaching the engine the way Ray would: from another thread, with a time-out."""
    loop = asyncio.get_running_loop()

    def init(transfer_info: Mapping[str, object]) -> None:
        asyncio.run_coroutine_threadsafe(init_transfer(engine, transfer_info), loop).result(TIMEOUT_S)

    def load(update: WeightUpdate) -> None:
        asyncio.run_coroutine_threadsafe(apply_update(engine, update), loop).result(TIMEOUT_S)

    client = OneCallClient(init=init, load=load)
    source = LearnerWeights(model, dtype=torch.float32)
    sender = await asyncio.to_thread(build_sender, "host_memory", source, client)
    yield sender
    sender.shutdown()


def not_kept() -> None:
    """The weights before, of a sender that keeps none."""


async def read_rows(engine: AsyncLLM, *, from_cache: bool = False) -> list[TopLogprobs]:
    """The engine's whole distributions for positions 1..n of the probe texts."""
    return [
        await read_text_rows(engine, text, request_id=f"probe-{i}", from_cache=from_cache)
        for i, text in enumerate(TEXTS)
    ]


async def read_text_rows(engine: AsyncLLM, text: Ids, *, request_id: str, from_cache: bool) -> TopLogprobs:
    sampling = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=VOCABULARY_SIZE,
        prompt_logprobs=None if from_cache else VOCABULARY_SIZE,
        detokenize=False,
    )
    async for output in engine.generate({"prompt_token_ids": text.tolist()}, sampling, request_id):
        last = output
    rows = [*(last.prompt_logprobs or [])[1:], last.outputs[0].logprobs[0]]
    ids = np.array([sorted(row) for row in rows], np.int32)
    logprobs = [[row[i].logprob for i in range(VOCABULARY_SIZE)] for row in rows]
    return TopLogprobs(ids, np.array(logprobs, np.float32))


async def test_registering_twice_does_no_harm() -> None:
    register()
    register()
    assert HOST_MEMORY in WeightTransferEngineFactory._registry


async def test_the_engine_starts_with_the_learner_s_weights(model: LlamaForCausalLM, engine: AsyncLLM) -> None:
    check_sync(model, not_kept, TEXTS, await read_rows(engine), tolerance=1e-4)


async def test_after_an_update_the_engine_says_what_the_learner_says(
    model: LlamaForCausalLM, engine: AsyncLLM, sender: WeightSender
) -> None:
    for version in (1, 2, 3):
        move_weights(model, seed=version)
        start_s = time.perf_counter()
        await asyncio.to_thread(sender.send, version)
        sync_s = time.perf_counter() - start_s
        report = check_sync(model, sender.previous_weights, TEXTS, await read_rows(engine), tolerance=1e-4)
        print(f"version {version}: sync {sync_s:.3f} s, largest difference {report}")
        assert await engine.get_weight_version() == str(version)
        assert not await engine.is_paused()


async def test_the_prefix_cache_of_the_old_weights_is_not_read(
    model: LlamaForCausalLM, engine: AsyncLLM, sender: WeightSender
) -> None:
    text = TEXTS[0]  # longer than a block, so that the second reading comes from the cache
    for _ in range(2):
        await read_text_rows(engine, text, request_id="warm", from_cache=True)
    move_weights(model, seed=10)
    await asyncio.to_thread(sender.send, 4)
    row = await read_text_rows(engine, text, request_id="after", from_cache=True)
    whole_row = await read_text_rows(engine, text, request_id="whole", from_cache=False)
    assert np.allclose(row.logprobs[-1], whole_row.logprobs[-1], atol=1e-5)


async def write_on(engine: AsyncLLM, *, seed: int, num_tokens: int, first_token: asyncio.Event) -> list[int]:
    sampling = SamplingParams(
        max_tokens=num_tokens,
        temperature=1.0,
        seed=seed,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    token_ids: list[int] = []
    async for output in engine.generate({"prompt_token_ids": TEXTS[0].tolist()}, sampling, f"stream-{seed}"):
        token_ids.extend(output.outputs[0].token_ids)
        first_token.set()
    return token_ids


async def test_a_request_in_flight_goes_on_after_an_update_and_ends(
    model: LlamaForCausalLM, engine: AsyncLLM, sender: WeightSender
) -> None:
    num_tokens = 400
    started = [asyncio.Event() for _ in range(3)]
    requests = [
        asyncio.create_task(write_on(engine, seed=seed, num_tokens=num_tokens, first_token=event))
        for seed, event in enumerate(started)
    ]
    for event in started:
        await asyncio.wait_for(event.wait(), TIMEOUT_S)
    move_weights(model, seed=20)
    await asyncio.to_thread(sender.send, 5)
    assert not any(request.done() for request in requests), "the update came after the requests had ended"
    written = await asyncio.wait_for(asyncio.gather(*requests), TIMEOUT_S)
    assert [len(token_ids) for token_ids in written] == [num_tokens] * len(started)
    check_sync(model, sender.previous_weights, TEXTS, await read_rows(engine), tolerance=1e-4)


async def test_a_request_in_flight_is_read_again_with_the_new_weights(
    model: LlamaForCausalLM, engine: AsyncLLM, sender: WeightSender
) -> None:
    """The log-probs of what it writes after the update are the new model's on the whole text, old tokens included."""
    sampling = SamplingParams(
        max_tokens=300, temperature=0.0, logprobs=VOCABULARY_SIZE, ignore_eos=True, detokenize=False
    )
    num_written = 0

    async def write() -> object:
        nonlocal num_written
        async for output in engine.generate({"prompt_token_ids": TEXTS[0].tolist()}, sampling, "reread"):
            num_written = len(output.outputs[0].token_ids)
        return output.outputs[0]

    request = asyncio.create_task(write())
    while num_written < 10:
        await asyncio.sleep(0.001)
    move_weights(model, seed=21)
    await asyncio.to_thread(sender.send, 6)
    num_written_before = num_written
    completion = await asyncio.wait_for(request, TIMEOUT_S)
    text = np.array([*TEXTS[0], *completion.token_ids[:-1]], np.int32)
    rows = [[row[i].logprob for i in range(VOCABULARY_SIZE)] for row in completion.logprobs]
    ids = np.tile(np.arange(VOCABULARY_SIZE, dtype=np.int32), (text.size, 1))
    (learner,) = read_probe(model, [text], [TopLogprobs(ids, np.zeros(ids.shape, np.float32))])
    late = slice(num_written_before + 1, None)
    differences = np.abs(np.array(rows, np.float32) - learner[TEXTS[0].size - 1 :])
    assert num_written_before < 250, "the update came too late to see anything"
    assert differences[late].max() < 1e-4
    assert differences[:5].max() > 1e-2, "the first tokens were written with the old weights"


class WithoutTheHead(LearnerWeights):
    """What ``named_parameters()`` would send of a tied model."""

    def metadata(self) -> list[ParamMeta]:
        return [tensor for tensor in super().metadata() if tensor.name != "lm_head.weight"]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in super().__iter__() if name != "lm_head.weight")


async def test_a_tied_head_that_is_left_out_raises_nothing_in_vllm_and_the_probe_names_it(
    model: LlamaForCausalLM, engine: AsyncLLM, sender: WeightSender, tmp_path: Path
) -> None:
    move_weights(model, seed=30)
    await asyncio.to_thread(sender.send, 7)
    previous = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    move_weights(model, seed=31)
    path = tmp_path / "headless.safetensors"
    write_safetensors(path, WithoutTheHead(model, dtype=torch.float32))
    await apply_update(engine, WeightUpdate(version=8, transfer_info={"path": str(path)}))
    engine_rows = await read_rows(engine)
    assert compare_probe(engine_rows, read_probe(model, TEXTS, engine_rows)).max_difference > 0.1
    with pytest.raises(WeightSyncError, match=r"behaves as if lm_head\.weight had kept its old values") as raised:
        check_sync(model, lambda: previous, TEXTS, engine_rows, tolerance=1e-3)
    print(raised.value)
    await asyncio.to_thread(sender.send, 9)
    check_sync(model, lambda: previous, TEXTS, await read_rows(engine), tolerance=1e-4)


class Misfit(LearnerWeights):
    """One tensor under another name or in another shape, or left out."""

    def __init__(self, model: LlamaForCausalLM, *, name: str, instead: tuple[str, Tensor] | None) -> None:
        super().__init__(model, dtype=torch.float32)
        self._tensors = {
            **{other: tensor for other, tensor in super().__iter__() if other != name},
            **dict([instead] if instead else []),
        }

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors.items())


@pytest.mark.parametrize(
    ("name", "instead", "message"),
    [
        pytest.param(
            "model.norm.weight",
            ("model.norm.weight", torch.ones(63)),
            r"model\.norm\.weight \[63\] does not fit the engine's model .*expected the names and whole shapes",
            id="wrong shape",
        ),
        pytest.param(
            "model.norm.weight",
            ("model.standard.weight", torch.ones(64)),
            r"model\.standard\.weight \[64\] does not fit the engine's model .*no module or parameter named",
            id="wrong name",
        ),
        pytest.param(
            "model.layers.0.self_attn.v_proj.weight",
            ("model.layers.0.self_attn.v_proj.weight", torch.ones(31, 64)),
            r"v_proj\.weight \[31, 64\] does not fit the engine's model",
            id="wrong shape in a packed parameter",
        ),
        pytest.param("model.norm.weight", None, r"lacks model\.norm\.weight", id="missing"),
    ],
)
async def test_a_file_that_does_not_fit_is_refused_and_leaves_no_layer_half_written(
    name: str,
    instead: tuple[str, Tensor] | None,
    message: str,
    model: LlamaForCausalLM,
    engine: AsyncLLM,
    sender: WeightSender,
    tmp_path: Path,
) -> None:
    path = tmp_path / "misfit.safetensors"
    write_safetensors(path, Misfit(model, name=name, instead=instead))
    with pytest.raises(UpdateRefused, match=message):
        await apply_update(engine, WeightUpdate(version=10, transfer_info={"path": str(path)}))
    assert not await engine.is_paused()
    check_sync(model, not_kept, TEXTS, await read_rows(engine), tolerance=1e-4)
    await asyncio.to_thread(sender.send, 10)
    check_sync(model, not_kept, TEXTS, await read_rows(engine), tolerance=1e-4)


async def test_a_missing_file_leaves_the_engine_as_it_was(
    model: LlamaForCausalLM, engine: AsyncLLM, sender: WeightSender, tmp_path: Path
) -> None:
    update = WeightUpdate(version=11, transfer_info={"path": str(tmp_path / "nothing.safetensors")})
    with pytest.raises(UpdateRefused, match=r"nothing\.safetensors does not exist: the learner should have"):
        await apply_update(engine, update)
    check_sync(model, not_kept, TEXTS, await read_rows(engine), tolerance=1e-4)


async def test_an_engine_that_does_not_share_the_learner_s_memory_is_found_at_start(engine: AsyncLLM) -> None:
    with pytest.raises(Exception, match=r"host_memory needs learner and engine on one machine"):
        await init_transfer(engine, {"folder": "/dev/shm/of-another-machine"})
