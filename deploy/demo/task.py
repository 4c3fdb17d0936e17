"""The demo's task: chains of single-digit arithmetic modulo 10, evaluated left to right, with every step written out.

The answer to a prompt `7+3*8-2=` is `7+3=0;0*8=0;0-2=8;8`: one step per operator, each starting from the previous
digit, then the result. Text only: independent of tokenizer and model.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

DIGITS = "0123456789"
OPERATORS = "+-*"
END_OF_PROMPT = "="
END_OF_STEP = ";"

# All chains have the same length, so that step n reads the prompt at a fixed distance, which a small model learns in
# minutes. With mixed lengths 5, 6 and 7, the teacher had learned only the shortest chains after 800 updates.
NUM_OPERATORS = 6
# `7+3=0;` per step, then the result.
NUM_ANSWER_CHARACTERS = 6 * NUM_OPERATORS + 1

NUM_TRAIN = 2048
NUM_HELD_OUT = 500
SPLIT_SEED = 20251007


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One chain, the worked answer, and the result digit that is compared for grading."""

    prompt: str
    answer: str
    result: str

    def __post_init__(self) -> None:
        assert self.prompt.endswith(END_OF_PROMPT)
        assert self.answer.rpartition(END_OF_STEP)[2] == self.result


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The shipped problems. No prompt occurs twice, within a part or across both."""

    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]

    @property
    def prompts(self) -> frozenset[str]:
        return frozenset(problem.prompt for problem in self.train + self.held_out)


def apply(left: int, operator: str, right: int) -> int:
    """The result of one step: digit, operator, digit."""
    match operator:
        case "+":
            return (left + right) % 10
        case "-":
            return (left - right) % 10
        case "*":
            return (left * right) % 10
    raise ValueError(f"operator must be one of {OPERATORS!r}, got {operator!r}")


def write_problem(digits: Sequence[int], operators: str) -> Problem:
    """The chain of `digits` joined by `operators`, of any length, and its worked answer."""
    if len(digits) != len(operators) + 1:
        raise ValueError(f"{len(operators)} operators need {len(operators) + 1} digits, got {len(digits)}")
    chain, steps, value = str(digits[0]), "", digits[0]
    for operator, right in zip(operators, digits[1:], strict=True):
        outcome = apply(value, operator, right)
        chain += f"{operator}{right}"
        steps += f"{value}{operator}{right}={outcome}{END_OF_STEP}"
        value = outcome
    return Problem(prompt=chain + END_OF_PROMPT, answer=f"{steps}{value}", result=str(value))


def draw_problem(rng: random.Random) -> Problem:
    """A problem with uniform, independent digits and operators: 10^7 * 3^6 possible prompts."""
    digits = [rng.randrange(10) for _ in range(NUM_OPERATORS + 1)]
    return write_problem(digits, "".join(rng.choices(OPERATORS, k=NUM_OPERATORS)))


def stream_problems(seed: int, *, excluded_prompts: AbstractSet[str] = frozenset()) -> Iterator[Problem]:
    """An endless stream of problems, a pure function of `seed`. No prompt occurs twice, and no excluded one occurs."""
    rng = random.Random(seed)
    seen = set(excluded_prompts)
    while True:
        problem = draw_problem(rng)
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def make_split(seed: int = SPLIT_SEED) -> Split:
    """The shipped split: one stream, divided in two."""
    problems = stream_problems(seed)
    return Split(train=tuple(islice(problems, NUM_TRAIN)), held_out=tuple(islice(problems, NUM_HELD_OUT)))


def grade(completion: str, problem: Problem) -> bool:
    """Whether the text after the last `;` is the result. The steps are not checked."""
    return completion.rpartition(END_OF_STEP)[2] == problem.result


def write_prompts(path: Path, problems: Iterable[Problem]) -> None:
    """One JSON object per line: `prompt`; `answer`, the result digit, which evaluation compares; and `solution`, the
    whole worked answer, for training on dataset answers.
    """
    lines = (
        json.dumps({"prompt": problem.prompt, "answer": problem.result, "solution": problem.answer})
        for problem in problems
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and held_out.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; created if missing")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    split = make_split()
    write_prompts(out / "train.jsonl", split.train)
    write_prompts(out / "held_out.jsonl", split.held_out)
    print(f"wrote {len(split.train)} train and {len(split.held_out)} held-out prompts to {out}")


if __name__ == "__main__":
    main()
