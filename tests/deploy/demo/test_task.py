import json
import re
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.demo.task import (
    NUM_ANSWER_CHARACTERS,
    NUM_OPERATORS,
    OPERATORS,
    Problem,
    apply,
    grade,
    make_split,
    stream_problems,
    write_problem,
    write_prompts,
)

DATA = Path(__file__).parents[3] / "deploy" / "demo" / "data"

digits = st.integers(min_value=0, max_value=9)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[int], str]:
    operators = draw(st.text(alphabet=OPERATORS, min_size=1, max_size=9))
    return draw(st.lists(digits, min_size=len(operators) + 1, max_size=len(operators) + 1)), operators


def nested_value(prompt: str) -> int:
    """The chain's value, by Python's own arithmetic on whole numbers, brackets set from the left."""
    nested = prompt[0]
    for operator, right in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        nested = f"({nested}{operator}{right})"
    return int(eval(nested)) % 10


def shipped(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_the_example_in_the_documentation_is_what_the_generator_writes() -> None:
    assert write_problem([7, 3, 8, 2], "+*-") == Problem(prompt="7+3*8-2=", answer="7+3=0;0*8=0;0-2=8;8", result="8")


@given(chains())
def test_the_result_is_the_value_of_the_chain_read_from_the_left(chain: tuple[list[int], str]) -> None:
    problem = write_problem(*chain)
    assert problem.result == str(nested_value(problem.prompt))


@given(chains())
def test_every_step_is_right_and_starts_from_the_digit_before_it(chain: tuple[list[int], str]) -> None:
    problem = write_problem(*chain)
    *steps, result = problem.answer.split(";")
    parsed = [re.fullmatch(r"(\d)([-+*])(\d)=(\d)", step) for step in steps]
    parts = [step.groups() for step in parsed if step is not None]
    assert len(parts) == len(steps) == len(chain[1])
    assert all(nested_value(f"{left}{operator}{right}=") == int(outcome) for left, operator, right, outcome in parts)
    assert all(before[3] == after[0] for before, after in pairwise(parts))
    assert parts[0][0] + "".join(operator + right for _, operator, right, _ in parts) + "=" == problem.prompt
    assert parts[-1][3] == result == problem.result


@given(st.integers(min_value=0))
def test_problems_are_a_pure_function_of_the_seed(seed: int) -> None:
    assert list(islice(stream_problems(seed), 5)) == list(islice(stream_problems(seed), 5))


@given(st.integers(min_value=0))
def test_every_prompt_and_every_answer_has_the_stated_length(seed: int) -> None:
    for problem in islice(stream_problems(seed), 5):
        assert len(problem.prompt) == 2 * NUM_OPERATORS + 2  # operand and operator by turns, then `=`
        assert len(problem.answer) == NUM_ANSWER_CHARACTERS


def test_an_excluded_prompt_never_comes() -> None:
    first, second = islice(stream_problems(0), 2)
    assert next(stream_problems(0, excluded_prompts={first.prompt})) == second


def test_an_unknown_operator_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=re.escape("got '/'")):
        apply(1, "/", 2)


def test_a_chain_with_a_digit_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="2 operators need 3 digits, got 2"):
        write_problem([1, 2], "+-")


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("7+3=0;0*8=0;0-2=8;8", True),
        ("7+3=1;1*8=8;8-0=8;8", True),
        ("8", True),
        ("7+3=0;0*8=0;0-2=8;7", False),
        ("7+3=0;0*8=0;0-2=8;", False),
        ("7+3=0;0*8=0;0-2=8", False),
        ("7+3=0;0*8=0;0-2=8;88", False),
        ("", False),
    ],
)
def test_an_answer_is_graded_by_what_follows_the_last_semicolon(completion: str, right: bool) -> None:
    assert grade(completion, write_problem([7, 3, 8, 2], "+*-")) is right


def test_the_shipped_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    split = make_split()
    for name, problems in {"train.jsonl": split.train, "held_out.jsonl": split.held_out}.items():
        write_prompts(tmp_path / name, problems)
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_no_shipped_prompt_occurs_twice() -> None:
    train, held_out = shipped("train.jsonl"), shipped("held_out.jsonl")
    assert (len(train), len(held_out)) == (2048, 500)
    assert len({line["prompt"] for line in train + held_out}) == 2548


def test_the_shipped_answer_is_the_result_digit() -> None:
    for line in shipped("held_out.jsonl"):
        assert line["answer"] == str(nested_value(line["prompt"]))
        assert line["solution"].rpartition(";")[2] == line["answer"]
