"""Online equals lockstep: the pipelined controller on two real vLLM engines against a slow and obvious reference.

The reference steps both Hugging Face models token by token over the same text, sees the whole vocabulary, and applies
the rule as the paper states it. Nothing of it comes from ``rollout_server``.

B = prompts, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from common.config import SKD, AdaSwitch, Policy, Sampling
from common.sequence import FinishReason, MixedSequence, Prompt, TokenSource
from rollout_server.controller import SwitchingController
from tests.support.streams import sequences_of

EOS_ID = 2
VOCABULARY_SIZE = 32
MAX_NEW_TOKENS = 64
NUM_PROMPTS = 200
TIE = 1e-4  # logits, or nats between divergence and threshold; vLLM and Hugging Face differ by some 1e-5
DEMO_RULE = AdaSwitch(multiplier=3.0, window=10, floor=0.0)

pytestmark = pytest.mark.asyncio(loop_scope="session")


# ------------------------------------------------------------------------------------------------------- the reference


@dataclass(slots=True)
class Stepped:
    """One prompt's sequence as the reference writes it. nan where there is no value."""

    is_guided: bool = False
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    sources: list[TokenSource] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)  # nats
    thresholds: list[float] = field(default_factory=list)  # nats
    switches: list[int] = field(default_factory=list)
    closest_call: float = float("inf")  # how near a tie the closest of all decisions was

    def write(self, token_id: int, source: TokenSource, divergence: float, threshold: float) -> None:
        self.token_ids.append(token_id)
        self.sources.append(source)
        self.divergences.append(divergence)
        self.thresholds.append(threshold)
        if token_id == EOS_ID:
            self.finish_reason = "stop"
        elif len(self.token_ids) == MAX_NEW_TOKENS:
            self.finish_reason = "length"

    def decided_by(self, margin: float) -> None:
        self.closest_call = min(self.closest_call, abs(margin))


@torch.inference_mode()
def lockstep(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, prompts: Sequence[Prompt], policy: Policy
) -> list[Stepped]:
    """Both models read one token at a time, for all prompts (of one length) at once, until every sequence has ended."""
    sequences = [Stepped() for _ in prompts]
    student_cache, teacher_cache = DynamicCache(), DynamicCache()
    unread = torch.tensor(np.stack([prompt.token_ids for prompt in prompts])).long()  # [B, tokens both must read next]
    while any(sequence.finish_reason is None for sequence in sequences):
        student_logits_BV = next_logits(student, unread, student_cache)
        teacher_logits_BV = next_logits(teacher, unread, teacher_cache)
        for sequence, student_logits, teacher_logits in zip(
            sequences, student_logits_BV, teacher_logits_BV, strict=True
        ):
            if sequence.finish_reason is None:
                step(sequence, student_logits, teacher_logits, policy)
        unread = torch.tensor([[sequence.token_ids[-1]] for sequence in sequences])  # of ended ones: read and not used
    return sequences


def next_logits(model: LlamaForCausalLM, unread: Tensor, cache: DynamicCache) -> Tensor:
    logits: Tensor = model(input_ids=unread, past_key_values=cache, use_cache=True).logits[:, -1].double()
    return logits


def step(sequence: Stepped, student_logits: Tensor, teacher_logits: Tensor, policy: Policy) -> None:
    """One token, greedily."""
    nan = float("nan")
    if sequence.is_guided:
        sequence.decided_by(lead(teacher_logits))
        sequence.write(int(teacher_logits.argmax()), TokenSource.TEACHER, nan, nan)
        return
    position = len(sequence.token_ids)
    proposed = int(student_logits.argmax())
    divergence = forward_kl(teacher_logits, student_logits)
    threshold = nan
    if isinstance(policy, AdaSwitch):
        takes_over = False
        if position >= policy.window:
            total = 0.0
            for i in range(position - policy.window, position):
                total += sequence.divergences[i]
            threshold = max(policy.multiplier * total / policy.window, policy.floor)
            takes_over = divergence > threshold
            sequence.decided_by(divergence - threshold)
        sequence.is_guided = takes_over
    else:
        assert isinstance(policy, SKD)
        others = torch.cat([teacher_logits[:proposed], teacher_logits[proposed + 1 :]])
        cut = others.sort(descending=True).values[policy.top_k - 1]  # the proposal is kept when it is above this one
        takes_over = bool(teacher_logits[proposed] < cut)
        sequence.decided_by(float(teacher_logits[proposed] - cut))
        if takes_over:
            sequence.decided_by(lead(student_logits))  # another proposal might have been kept
    if takes_over:
        sequence.switches.append(position)
        sequence.decided_by(lead(teacher_logits))
        sequence.write(int(teacher_logits.argmax()), TokenSource.TEACHER, divergence, threshold)
    else:
        sequence.decided_by(lead(student_logits))
        sequence.write(proposed, TokenSource.STUDENT, divergence, threshold)


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> float:
    """sum over the vocabulary of p (log p - log q), nats."""
    log_p, log_q = teacher_logits.log_softmax(0), student_logits.log_softmax(0)
    return float((log_p.exp() * (log_p - log_q)).sum())


def lead(logits: Tensor) -> float:
    """How far the best is ahead of the second."""
    best, second = logits.topk(2).values.tolist()
    return float(best - second)


# ---------------------------------------------------------------------------------------------------------- comparison


async def write_online(
    engines, prompts: Sequence[Prompt], policy: Policy, *, chunk_tokens: int = 16
) -> list[MixedSequence]:
    """The same prompts through the controller, in their order."""
    controller = SwitchingController(
        student=engines.student,
        teacher=engines.teacher,
        policy=policy,
        sampling=Sampling(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS, chunk_tokens=chunk_tokens),
        top_logprobs=VOCABULARY_SIZE,
        stop_token_ids=(EOS_ID,),
    )
    written = {sequence.sequence_id: sequence for sequence in await sequences_of(controller, prompts)}
    return [written[prompt.sequence_id] for prompt in prompts]


def assert_same(online: MixedSequence, stepped: Stepped) -> float:
    """Everything decided must be equal. Returns the largest difference of what was measured, nats."""
    name = online.sequence_id
    assert online.token_ids.tolist() == stepped.token_ids, name
    assert online.sources.tolist() == stepped.sources, name
    assert online.switches.tolist() == stepped.switches, name
    assert online.finish_reason == stepped.finish_reason, name
    differences = [0.0]
    for measured, expected in ((online.divergences, stepped.divergences), (online.thresholds, stepped.thresholds)):
        assert np.isnan(measured).tolist() == np.isnan(expected).tolist(), name
        difference = np.abs(measured - np.array(expected))
        differences.append(float(difference[~np.isnan(difference)].max(initial=0.0)))
    return max(differences)


def assert_all_same(online: Sequence[MixedSequence], stepped: Sequence[Stepped]) -> int:
    """All but the prompts with a near tie, in which rounding may decide. Returns how many were compared."""
    clear = [pair for pair in zip(online, stepped, strict=True) if pair[1].closest_call > TIE]
    worst = max(assert_same(*pair) for pair in clear)
    print(f"compared {len(clear)} of {len(stepped)} prompts, largest difference {worst:.2g} nats")
    assert worst < 1e-3
    return len(clear)


@pytest.fixture(scope="module")
def stepped_by_demo_rule(models, held_out_prompts) -> list[Stepped]:
    return lockstep(models.student, models.teacher, held_out_prompts[:NUM_PROMPTS], DEMO_RULE)


async def test_adaswitch_is_what_stepping_both_models_token_by_token_gives(
    engines, held_out_prompts, stepped_by_demo_rule
) -> None:
    online = await write_online(engines, held_out_prompts[:NUM_PROMPTS], DEMO_RULE)
    assert assert_all_same(online, stepped_by_demo_rule) >= 150
    num_switched = sum(bool(sequence.switches) for sequence in stepped_by_demo_rule)
    assert num_switched > NUM_PROMPTS / 2, "the comparison must be of sequences that switch"
    print(f"{num_switched} switched")


async def test_skd_is_what_stepping_both_models_token_by_token_gives(engines, models, held_out_prompts) -> None:
    policy, prompts = SKD(top_k=3), held_out_prompts[:NUM_PROMPTS]
    stepped = lockstep(models.student, models.teacher, prompts, policy)
    assert assert_all_same(await write_online(engines, prompts, policy), stepped) >= 150
    num_switches = [len(sequence.switches) for sequence in stepped]
    print(f"{sum(num_switches)} switches, at most {max(num_switches)} in a sequence")
    assert max(num_switches) > 1, "the comparison must be of sequences in which the student goes on after the teacher"


@pytest.mark.parametrize("chunk_tokens", [1, 8, 32, MAX_NEW_TOKENS])
async def test_the_chunk_size_does_not_change_the_lockstep_result(
    chunk_tokens, engines, held_out_prompts, stepped_by_demo_rule
) -> None:
    num_prompts = 40
    online = await write_online(engines, held_out_prompts[:num_prompts], DEMO_RULE, chunk_tokens=chunk_tokens)
    assert assert_all_same(online, stepped_by_demo_rule[:num_prompts]) >= 30


async def test_siblings_that_share_whole_cached_blocks_are_lockstep_too(engines, models, held_out_prompts) -> None:
    """A prompt that ends on a block border, written several times at once and once more: every read hits the cache."""
    start = held_out_prompts[0]
    text = models.teacher.generate(torch.from_numpy(start.token_ids).long()[None], max_length=32, do_sample=False)[0]
    siblings = [
        Prompt(prompt_id="border", token_ids=text.numpy().astype(np.int32), seed=0, sample_index=index)
        for index in range(4)
    ]
    (stepped,) = lockstep(models.student, models.teacher, siblings[:1], DEMO_RULE)
    assert stepped.closest_call > TIE
    for _ in range(2):
        for online in await write_online(engines, siblings, DEMO_RULE, chunk_tokens=4):
            assert assert_same(online, stepped) < 1e-3
