"""Trains the demo's two models: a teacher that solves the task, and a student with too little data.

Both learn by plain cross-entropy on the answer's tokens, from problems that are never among the shipped prompts. The
teacher never sees a problem twice. The student sees 640 of them repeatedly, as in fine-tuning on a small data set: it
is confident everywhere and wrong in some places, so its divergence from the teacher has a few high spikes.
Training stops at an accuracy, not at a step count.

One thread and fixed seeds: the same machine gives the same files.

Axes: B sequences, T positions.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.demo.measure import accuracy, complete
from deploy.demo.task import Problem, make_split, stream_problems
from deploy.demo.tokenizer import BOS_ID, EOS_ID, MAX_LENGTH, PAD_ID, VOCABULARY, make_tokenizer

NOT_TRAINED = -100
BATCH_SIZE = 64
WARMUP_UPDATES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One model: its size, its training, and the accuracy at which it is finished."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    seed: int
    # Distinct problems, repeated; None for a new one every time.
    num_problems: int | None
    num_validation: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    # From the accuracy `slow_from` on, training uses `slow_learning_rate`.
    slow_from: float
    slow_learning_rate: float
    # The model is finished when its validation accuracy is in this range, both ends included, ...
    done_from: float
    done_to: float
    # ... and the mean loss since the last evaluation is at most this, nats per token.
    done_loss: float
    eval_every: int
    max_updates: int


TEACHER = Recipe(
    name="teacher",
    hidden_size=128,
    intermediate_size=384,
    num_layers=3,
    seed=1,
    num_problems=None,
    num_validation=512,
    learning_rate=2e-3,
    weight_decay=0.01,
    betas=(0.9, 0.999),
    slow_from=0.98,
    slow_learning_rate=6e-4,
    done_from=1.0,
    done_to=1.0,
    # Low enough to be right when sampling too: at this loss about one answer in 100 is wrong.
    done_loss=3e-4,
    eval_every=50,
    max_updates=2500,
)
STUDENT = Recipe(
    name="student",
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    seed=2,
    num_problems=640,
    num_validation=256,
    learning_rate=2e-3,
    weight_decay=0.1,
    betas=(0.9, 0.99),
    slow_from=1.0,
    slow_learning_rate=2e-3,
    done_from=0.36,
    done_to=0.42,
    done_loss=math.inf,
    eval_every=20,
    max_updates=2500,
)


def make_model(recipe: Recipe) -> LlamaForCausalLM:
    """A new model with weights from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            # vLLM's attention kernels need a head size of at least 32.
            num_attention_heads=recipe.hidden_size // 32,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            dtype="float32",
        )
    )


def collate(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """[B, T] input ids and labels: BOS, prompt, answer, EOS, padded on the right; prompt and padding not trained."""
    prompt_ids = tokenizer([problem.prompt for problem in problems]).input_ids
    answer_ids = tokenizer([problem.answer for problem in problems], add_special_tokens=False).input_ids
    length = max(len(prompt) + len(answer) + 1 for prompt, answer in zip(prompt_ids, answer_ids, strict=True))
    input_ids_BT = torch.full((len(problems), length), PAD_ID)
    labels_BT = torch.full((len(problems), length), NOT_TRAINED)
    for row, (prompt, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer) + 1
        input_ids_BT[row, :end] = torch.tensor([*prompt, *answer, EOS_ID])
        labels_BT[row, start:end] = input_ids_BT[row, start:end]
    return input_ids_BT, labels_BT


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, input_ids_BT: Tensor, labels_BT: Tensor
) -> float:
    """One update. Returns the mean cross-entropy in nats per trained token.

    No attention mask: padding is on the right, so no trained position attends to it.
    """
    loss = model(input_ids=input_ids_BT, labels=labels_BT).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def train_until_done(
    recipe: Recipe,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Iterator[Problem],
    validation: Sequence[Problem],
) -> None:
    """Trains in place until the recipe is finished. RuntimeError if the accuracy range is skipped or not reached."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=recipe.betas
    )
    learning_rate, summed_loss, start_s = recipe.learning_rate, 0.0, time.perf_counter()
    for update in range(1, recipe.max_updates + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, update / WARMUP_UPDATES)
        batch = collate(list(islice(problems, BATCH_SIZE)), tokenizer)
        summed_loss += train_step(model, optimizer, *batch)
        if update % recipe.eval_every:
            continue
        loss, summed_loss = summed_loss / recipe.eval_every, 0.0
        share_right = accuracy(complete(model, tokenizer, validation), validation)
        print_progress(recipe, update, loss, share_right, time.perf_counter() - start_s)
        if share_right > recipe.done_to:
            raise RuntimeError(f"{recipe.name}: accuracy {share_right:.3f} has exceeded {recipe.done_to}")
        if share_right >= recipe.done_from and loss <= recipe.done_loss:
            return
        if share_right >= recipe.slow_from:
            learning_rate = recipe.slow_learning_rate
    raise RuntimeError(f"{recipe.name}: not finished after {recipe.max_updates} updates")


def repeat_problems(problems: list[Problem]) -> Iterator[Problem]:
    """The same problems repeated endlessly, in a new order each time."""
    rng = random.Random(0)
    while True:
        rng.shuffle(problems)
        yield from problems


def print_progress(recipe: Recipe, update: int, loss: float, share_right: float, elapsed_s: float) -> None:
    """One line per evaluation. The remaining time is an upper bound, up to the last allowed update."""
    at_most_s = elapsed_s / update * (recipe.max_updates - update)
    print(
        f"{recipe.name}: update {update:5d}  loss {loss:.5f} nats  accuracy {share_right:.3f}"
        f"  {elapsed_s:4.0f} s, at most {at_most_s:.0f} s to go",
        flush=True,
    )


def make(recipe: Recipe, folder: Path, shipped_prompts: AbstractSet[str]) -> None:
    """Trains one model and saves it with its tokenizer, for `from_pretrained` and for vLLM."""
    tokenizer = make_tokenizer()
    model = make_model(recipe)
    problems = stream_problems(recipe.seed, excluded_prompts=shipped_prompts)
    # Taken from the same stream before training, so none of them is trained on.
    validation = list(islice(problems, recipe.num_validation))
    if recipe.num_problems is not None:
        problems = repeat_problems(list(islice(problems, recipe.num_problems)))
    train_until_done(recipe, model, tokenizer, problems, validation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's teacher and student.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets teacher/ and student/")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    shipped_prompts = make_split().prompts
    for recipe in (STUDENT, TEACHER):
        make(recipe, out / recipe.name, shipped_prompts)


if __name__ == "__main__":
    main()
