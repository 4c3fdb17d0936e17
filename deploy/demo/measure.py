"""Measures the demo models: accuracy, and the student's divergence from the teacher.

    python -m deploy.demo.measure --models deploy/demo/models

Plain Hugging Face generation, so the results are independent of the engines that they are compared with.

Axes: B sequences, P prompt positions (padded on the left), T completion positions, V vocabulary.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deploy.demo.task import NUM_ANSWER_CHARACTERS, Problem, grade, make_split
from deploy.demo.tokenizer import EOS_ID, make_tokenizer

NUM_COMPLETION_TOKENS = NUM_ANSWER_CHARACTERS + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """One model's output for a batch of prompts.

    input_ids_BPT: prompts and completions.
    attention_mask_BPT: 1 on the prompt with its BOS and on the completion with its EOS, otherwise 0.
    num_prompt_columns: column where the completions begin.
    texts: the completions without special tokens.
    """

    input_ids_BPT: Tensor
    attention_mask_BPT: Tensor
    num_prompt_columns: int
    texts: list[str]


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], *, sample: bool = False
) -> Completions:
    """Greedy completions, or samples at temperature 1, cut at the length of a correct answer."""
    prompts = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt")
    num_prompt_columns = prompts.input_ids.shape[1]
    # Hugging Face's default is top_k=50, which changes nothing with 32 symbols but is not intended.
    decoding = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    input_ids_BPT = model.generate(**prompts, **decoding, max_new_tokens=NUM_COMPLETION_TOKENS)
    completion_ids_BT = input_ids_BPT[:, num_prompt_columns:]
    is_eos_BT = (completion_ids_BT == EOS_ID).long()
    has_ended_BT = is_eos_BT.cumsum(dim=1) - is_eos_BT
    return Completions(
        input_ids_BPT=input_ids_BPT,
        attention_mask_BPT=torch.cat([prompts.attention_mask, 1 - has_ended_BT], dim=1),
        num_prompt_columns=num_prompt_columns,
        texts=tokenizer.batch_decode(completion_ids_BT, skip_special_tokens=True),
    )


def accuracy(completions: Completions, problems: Sequence[Problem]) -> float:
    """Share of completions that end in the right result."""
    return sum(map(grade, completions.texts, problems)) / len(problems)


def exact_match(completions: Completions, problems: Sequence[Problem]) -> float:
    """Share of completions in which every step is right, not only the result."""
    answers = [problem.answer for problem in problems]
    return sum(text == answer for text, answer in zip(completions.texts, answers, strict=True)) / len(problems)


@torch.no_grad()
def forward_kl(teacher: PreTrainedModel, student: PreTrainedModel, completions: Completions) -> Tensor:
    """[num_tokens] nats. KL(teacher || student) at each completion token, EOS included, full vocabulary."""
    inputs = {"input_ids": completions.input_ids_BPT, "attention_mask": completions.attention_mask_BPT}
    # The logits at position i predict token i + 1.
    predicting = slice(completions.num_prompt_columns - 1, -1)
    teacher_logprobs_BTV = teacher(**inputs).logits[:, predicting].log_softmax(dim=-1)
    student_logprobs_BTV = student(**inputs).logits[:, predicting].log_softmax(dim=-1)
    divergence_BT = (teacher_logprobs_BTV.exp() * (teacher_logprobs_BTV - student_logprobs_BTV)).sum(dim=-1)
    divergence: Tensor = divergence_BT[completions.attention_mask_BPT[:, completions.num_prompt_columns :] == 1]
    return divergence


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo's teacher and student on the held-out prompts.")
    parser.add_argument("--models", type=Path, required=True, help="folder that holds teacher/ and student/")
    folder: Path = parser.parse_args().models
    torch.manual_seed(0)
    tokenizer, problems = make_tokenizer(), make_split().held_out
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("teacher", "student")}
    for name, model in models.items():
        greedy = complete(model, tokenizer, problems)
        samples = complete(model, tokenizer, problems, sample=True)
        print(
            f"{name}: {model.num_parameters()} parameters, right {accuracy(greedy, problems):.3f} greedy, "
            f"{accuracy(samples, problems):.3f} sampled, every step right {exact_match(greedy, problems):.3f} greedy"
        )
    divergence = forward_kl(models["teacher"], models["student"], samples)
    median, p90, p99 = divergence.quantile(torch.tensor([0.5, 0.9, 0.99])).tolist()
    print(
        f"forward KL on {len(divergence)} tokens sampled by the student, nats: "
        f"mean {divergence.mean():.3f}, median {median:.1e}, p90 {p90:.3f}, p99 {p99:.2f}"
    )


if __name__ == "__main__":
    main()
