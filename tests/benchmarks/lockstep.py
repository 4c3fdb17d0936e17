"""The slow way, to measure speed-ups against: both Hugging Face models step over the same texts, token by token.

Full-vocabulary divergences, the same policies. What it writes is checked elsewhere
(``tests/rollout_server/test_lockstep.py``); here only its time counts.

B = sequences, V = vocabulary.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from common.config import Policy
from common.divergence import divergence
from common.sequence import Prompt
from rollout_server.policies import ScoredPositions, divergence_of, make_policy
from tests.benchmarks.pairs import PairOfModels


@torch.inference_mode()
def lockstep_seconds_per_token(
    pair: PairOfModels, policy_settings: Policy, prompts: Sequence[Prompt], num_steps: int
) -> float:
    """Wall time by token of all prompts (of one length) at once, on all cores; models and caches are warm.

    The prompts are read once; the time of a later step is the mean of ``num_steps`` of them.
    """
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (pair.student, pair.teacher)
    )
    policy, kind = make_policy(policy_settings), divergence_of(policy_settings)
    num_prompts, limits = len(prompts), [policy.exploration_limit(prompt.seed) for prompt in prompts]
    divergences = np.full((num_prompts, num_steps), np.nan, np.float32)
    ranks = np.full((num_prompts, num_steps), -1, np.int32)
    guided_until = np.zeros(num_prompts, int)  # the first position the student may propose for again
    num_switches = np.zeros(num_prompts, int)
    unread = torch.from_numpy(np.stack([prompt.token_ids for prompt in prompts])).long()
    for model in (student, teacher):
        model(input_ids=unread, logits_to_keep=1)
    student_cache, teacher_cache = DynamicCache(), DynamicCache()
    times_s = [time.perf_counter()]
    for position in range(num_steps):
        log_q_BV, log_p_BV = (
            model(input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
            .logits[:, -1]
            .log_softmax(-1)
            for model, cache in ((student, student_cache), (teacher, teacher_cache))
        )
        proposed, taken = (torch.multinomial(log_BV.exp(), 1)[:, 0] for log_BV in (log_q_BV, log_p_BV))
        divergences[:, position] = divergence(log_p_BV, log_q_BV, kind).numpy()
        ranks[:, position] = (log_p_BV > log_p_BV.gather(1, proposed[:, None])).sum(1).numpy()
        for row in range(num_prompts):
            if position < guided_until[row]:
                divergences[row, position] = np.nan
                continue
            seen = ScoredPositions(
                first=position,
                divergences=divergences[row, : position + 1],
                student_ranks=ranks[row, : position + 1],
                num_switches=int(num_switches[row]),
            )
            limit = limits[row]
            if policy.decide(seen).switch is not None or (limit is not None and position >= limit):
                guided_until[row] = position + (policy.guidance_tokens or num_steps)
                num_switches[row] += 1
        is_guided = torch.from_numpy(position < guided_until)
        unread = taken.where(is_guided, proposed)[:, None]
        times_s.append(time.perf_counter())
    prompts_s, step_s = times_s[1] - times_s[0], (times_s[-1] - times_s[1]) / (num_steps - 1)
    return (prompts_s + step_s * (pair.max_new_tokens - 1)) / (num_prompts * pair.max_new_tokens)
