"""A bfloat16 engine that missed a weight sync, or half of one, is found, at the learning rates that users have.

One step at 1e-5 changes log-probs by less than bfloat16 rounds them. The student engine, the learner and the weight
transfer are real; the teacher is SmolLM2 in Hugging Face.
"""

import asyncio
import copy
from collections.abc import AsyncIterator, Mapping

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import EngineSettings, Trainer
from common.sequence import Ids, MixedSequence, Prompt, TokenSource, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.protocol import EngineSpec, ScoreRequest
from rollout_server.engines.vllm import VLLMEngine
from tests.support.smollm2 import smollm2_pair
from trainer.learner import Learner
from trainer.probe import ProbeLimits, SyncProbe, WeightSyncError
from trainer.weight_sender import LearnerWeights, OneCallClient, WeightSender, build_sender

K, NUM_NEW_TOKENS = 64, 12
QUESTIONS = ["What is the sea?", "Name a cat.", "Why is it cold in winter?", "Write a line about bread."]
TIMEOUT_S = 120.0

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(900)]


@torch.inference_mode()
def taught_sequences() -> list[MixedSequence]:
    """The teacher's greedy answers, with its own distributions."""
    folder = smollm2_pair().teacher
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = []
    for number, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        prompt_S = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        text = teacher.generate(
            prompt_S, max_new_tokens=NUM_NEW_TOKENS, min_new_tokens=NUM_NEW_TOKENS, do_sample=False
        )[0]
        logprobs = teacher(text[None]).logits[0, -NUM_NEW_TOKENS - 1 : -1].log_softmax(dim=-1)
        best = logprobs.topk(K)
        top = TopLogprobs(best.indices.numpy().astype(np.int32), best.values.numpy())
        prompt_ids, token_ids = text.numpy().astype(np.int32)[:-NUM_NEW_TOKENS], text.numpy().astype(np.int32)
        sequences.append(written_by_the_teacher(str(number), prompt_ids, token_ids[-NUM_NEW_TOKENS:], top))
    return sequences


def written_by_the_teacher(prompt_id: str, prompt_ids: Ids, token_ids: Ids, top: TopLogprobs) -> MixedSequence:
    num_tokens = token_ids.size
    nothing = np.full(num_tokens, np.nan, np.float32)
    return MixedSequence(
        prompt=Prompt(prompt_id=prompt_id, token_ids=prompt_ids, seed=0),
        policy="off_policy",
        token_ids=token_ids,
        sources=np.full(num_tokens, TokenSource.TEACHER, np.uint8),
        divergences=nothing,
        thresholds=nothing,
        student_ranks=np.full(num_tokens, -1, np.int32),
        student_logprobs=nothing,
        teacher_logprobs=top.logprob_of(token_ids),
        student_top=TopLogprobs.unknown(num_tokens, K),
        teacher_top=top,
        weight_versions=np.full(num_tokens, -1, np.int32),
        switches=np.array([0], np.int32),
        finish_reason="length",
        num_wasted_tokens=0,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[VLLMEngine]:
    """The student's."""
    settings = EngineSettings(dtype="bfloat16", enforce_eager=True, kv_cache_gib=0.25, max_model_len=128)
    spec = EngineSpec(
        name="student",
        model=str(smollm2_pair().student),
        settings=settings,
        top_logprobs=K,
        weight_transfer_backend="host_memory",
    )
    engine = VLLMEngine.start(spec)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def sequences() -> list[MixedSequence]:
    """What is trained on, and what the probe reads."""
    return taught_sequences()


async def connect(learner: Learner, engine: VLLMEngine) -> WeightSender:
    """The learner's half of the weight transfer, reaching the engine as Ray would: from another thread."""
    loop = asyncio.get_running_loop()

    def init(transfer_info: Mapping[str, object]) -> None:
        asyncio.run_coroutine_threadsafe(engine.init_weight_transfer(transfer_info), loop).result(TIMEOUT_S)

    def load(update: WeightUpdate) -> None:
        asyncio.run_coroutine_threadsafe(engine.load_weights(update), loop).result(TIMEOUT_S)

    source = LearnerWeights(learner.model, dtype=torch.bfloat16)
    return await asyncio.to_thread(build_sender, "host_memory", source, OneCallClient(init=init, load=load))


# At 1e-5 the first step stays below the grid of weights that come from bfloat16: an engine has nothing to follow. At
# 1e-4 the output layer alone moves log-probs by a twentieth of what rounding does: one sync shows too little.
@pytest.mark.parametrize(
    ("learning_rate", "kept", "reason"),
    [
        (1e-4, "model", r"did not follow the learner|engine and learner differ"),
        (5e-4, "model.embed_tokens", r"did not follow the learner: .* of the step's change in the output layer"),
    ],
)
async def test_an_engine_must_hold_what_it_was_sent(
    learning_rate: float, kept: str, reason: str, engine: VLLMEngine, sequences: list[MixedSequence]
) -> None:
    """What is ``kept`` is first left at its old values. The output layer is tied to the embedding."""
    texts = [np.concatenate([it.prompt.token_ids, it.token_ids[:-1]]) for it in sequences]

    async def rows() -> list[list[TopLogprobs]]:
        requests = [ScoreRequest(token_ids=text, start=1) for text in texts]
        return [list(await asyncio.gather(*map(engine.score, requests)))]

    learner = Learner(str(smollm2_pair().student), Trainer(learning_rate=learning_rate), seed=0)
    sender = await connect(learner, engine)
    await asyncio.to_thread(sender.send, 0)  # an earlier case may have trained it
    probes = {name: SyncProbe(learner.model, engine_dtype=torch.bfloat16) for name in ("stale", "right")}
    before = await rows()
    start_limits = ProbeLimits.choose(tolerance=None, in_float32=False, noise=None)
    noise = probes["right"].measure_noise(texts, before, start_limits)
    limits = ProbeLimits.choose(tolerance=None, in_float32=False, noise=noise)
    for probe in probes.values():
        probe.read_before(texts, before)
    old = copy.deepcopy(learner.model.get_submodule(kept).state_dict())
    learner.step(sequences)
    new = copy.deepcopy(learner.model.get_submodule(kept).state_dict())

    learner.model.get_submodule(kept).load_state_dict(old)
    await asyncio.to_thread(sender.send, 1)
    learner.model.get_submodule(kept).load_state_dict(new)
    with pytest.raises(WeightSyncError, match=reason) as stale:
        probes["stale"].check(texts, await rows(), limits)
    await asyncio.to_thread(sender.send, 2)
    report = probes["right"].check(texts, await rows(), limits)
    sender.shutdown()
    print(f"learning rate {learning_rate:g}: {noise}")
    print(f"stale: {stale.value}\nright: {report}")
    assert report.followed == pytest.approx(1.0, abs=0.25)
