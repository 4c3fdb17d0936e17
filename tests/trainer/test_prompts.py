import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from common.config import Data
from common.errors import UserError
from common.sequence import Prompt
from trainer.prompts import PromptCursor, PromptStream, prompt_seed

Rows = list[dict[str, Any]]
Open = Callable[..., PromptStream]
TEXTS: Rows = [{"prompt": f"w{number} w{number + 1}", "answer": number} for number in range(10)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Rows], str]:
    def write_rows(rows: Rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


@pytest.fixture
def open_stream(write: Callable[[Rows], str], make_tokenizer: Callable[..., Any]) -> Open:
    def open_rows(
        rows: Rows | str,
        *,
        chat_template: str | None = None,
        max_prompt_tokens: int = 100,
        samples_per_prompt: int = 1,
        cursor: PromptCursor | None = None,
        key: str = "data",
        **config: Any,
    ) -> PromptStream:
        return PromptStream(
            Data(path=rows if isinstance(rows, str) else write(rows), **config),
            make_tokenizer(chat_template=chat_template),
            seed=7,
            max_prompt_tokens=max_prompt_tokens,
            samples_per_prompt=samples_per_prompt,
            cursor=cursor,
            key=key,
        )

    return open_rows


def identity(prompts: list[Prompt]) -> list[tuple[Any, ...]]:
    return [(p.prompt_id, p.epoch, p.sample_index, p.seed, tuple(p.token_ids), p.answer) for p in prompts]


# ------------------------------------------------------------------------------------------------- what a prompt holds


def test_plain_text_becomes_the_tokenizers_own_ids(open_stream: Open, make_tokenizer: Callable[..., Any]) -> None:
    prompts = open_stream(TEXTS, answer_field="answer").all()
    assert [p.prompt_id for p in prompts] == [str(number) for number in range(10)]
    assert [p.answer for p in prompts] == [str(number) for number in range(10)]
    for prompt, row in zip(prompts, TEXTS, strict=True):
        assert prompt.token_ids.tolist() == make_tokenizer()(row["prompt"]).input_ids


def test_messages_go_through_the_chat_template(
    open_stream: Open, make_tokenizer: Callable[..., Any], chat_template: str
) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "w1"}]},
        {"prompt": [{"role": "system", "content": "w2", "name": "w9"}, {"role": "user", "content": "w3 w4"}]},
    ]
    prompts = open_stream(rows, chat_template=chat_template).all()
    tokenizer = make_tokenizer()
    assert tokenizer.decode(prompts[0].token_ids) == "user w1 assistant"
    assert tokenizer.decode(prompts[1].token_ids) == "system w2 user w3 w4 assistant"


def test_one_file_may_hold_text_and_messages(open_stream: Open, chat_template: str) -> None:
    rows = [{"prompt": "w1"}, {"prompt": [{"role": "user", "content": "w1"}]}, {"prompt": "w2 w3"}]
    assert [p.token_ids.size for p in open_stream(rows, chat_template=chat_template).all()] == [1, 3, 2]


def test_a_row_without_an_answer_has_none(open_stream: Open) -> None:
    prompts = open_stream([{"prompt": "w1", "answer": None}, {"prompt": "w2", "answer": "x"}], answer_field="answer")
    assert [p.answer for p in prompts.all()] == [None, "x"]


def test_parquet_and_globs_are_read_in_the_order_of_their_names(
    open_stream: Open, write: Callable[..., str], tmp_path: Path
) -> None:
    Dataset.from_list(TEXTS).to_parquet(str(tmp_path / "rows.parquet"))
    from_parquet = open_stream(str(tmp_path / "rows.parquet")).all()
    write(TEXTS[5:], name="part-1.jsonl")
    write(TEXTS[:5], name="part-0.jsonl")
    from_glob = open_stream(str(tmp_path / "part-*.jsonl")).all()
    assert identity(from_parquet) == identity(from_glob) == identity(open_stream(TEXTS).all())


def test_a_folder_with_a_downloaded_data_set_is_read(
    open_stream: Open, write: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "downloaded").mkdir()
    write(TEXTS, name="downloaded/train.jsonl")
    assert identity(open_stream(str(tmp_path / "downloaded")).all()) == identity(open_stream(TEXTS).all())


def test_max_prompts_takes_the_first_rows(open_stream: Open) -> None:
    assert identity(open_stream(TEXTS, max_prompts=3).all()) == identity(open_stream(TEXTS).all())[:3]
    assert len(open_stream(TEXTS, max_prompts=99)) == 10


@pytest.mark.parametrize("prompt_id", ["HumanEval/0", "a b", "a%2Fb", "ü~", "..", 17])
def test_an_id_is_safe_in_file_names_and_urls(open_stream: Open, prompt_id: str | int) -> None:
    (prompt,) = open_stream([{"prompt": "w1", "id": prompt_id}], id_field="id").all()
    assert quote(prompt.sequence_id, safe="") == prompt.sequence_id
    assert "/" not in prompt.sequence_id


def test_ids_that_differ_stay_different_when_made_safe(open_stream: Open) -> None:
    ids = ["a/b", "a%2Fb", "a~2Fb", "a_b"]
    prompts = open_stream([{"prompt": "w1", "id": prompt_id} for prompt_id in ids], id_field="id").all()
    assert len({p.prompt_id for p in prompts}) == len(ids)


def test_a_changed_file_is_read_again(open_stream: Open) -> None:
    assert open_stream([{"prompt": "w1 w2"}]).all()[0].token_ids.size == 2
    assert open_stream([{"prompt": "w1 w2 w3"}]).all()[0].token_ids.size == 3


# ------------------------------------------------------------------------------------------------- order, cursor, seeds


def test_each_epoch_visits_every_row_once_in_an_order_of_its_own(open_stream: Open) -> None:
    stream = open_stream(TEXTS)
    orders = [[p.prompt_id for p in stream.take(10)] for _ in range(3)]
    assert all(sorted(order) == sorted(map(str, range(10))) for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_without_shuffle_rows_come_as_they_are(open_stream: Open) -> None:
    stream = open_stream(TEXTS, shuffle=False)
    assert [p.prompt_id for p in stream.take(12)] == [*map(str, range(10)), "0", "1"]
    assert stream.cursor == PromptCursor(epoch=1, position=2)


def test_samples_of_a_row_stand_together_and_differ_in_their_seed(open_stream: Open) -> None:
    prompts = open_stream(TEXTS, samples_per_prompt=3).take(2)
    assert [p.sample_index for p in prompts] == [0, 1, 2, 0, 1, 2]
    assert len({p.prompt_id for p in prompts}) == 2
    assert len({p.seed for p in prompts}) == 6


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_taken", [0, 1, 7, 10, 13, 25])
def test_a_stream_made_from_a_cursor_goes_on_with_the_same_prompts(
    open_stream: Open, num_taken: int, shuffle: bool
) -> None:
    going_on = open_stream(TEXTS, samples_per_prompt=2, shuffle=shuffle)
    going_on.take(num_taken)
    resumed = open_stream(TEXTS, samples_per_prompt=2, shuffle=shuffle, cursor=going_on.cursor)
    assert identity(resumed.take(15)) == identity(going_on.take(15))
    assert resumed.cursor == going_on.cursor


def test_a_peek_leaves_the_cursor_where_it_was(open_stream: Open) -> None:
    stream = open_stream(TEXTS)
    stream.take(7)
    seen = stream.peek(6)
    assert identity(seen) == identity(stream.take(6))


@pytest.mark.parametrize("size", [1, 3, 10, 30])
def test_how_many_are_taken_at_once_changes_nothing(open_stream: Open, size: int) -> None:
    stream = open_stream(TEXTS)
    in_pieces = [prompt for _ in range(30 // size) for prompt in stream.take(size)]
    assert identity(in_pieces) == identity(open_stream(TEXTS).take(30))


def test_all_ignores_cursor_and_shuffle(open_stream: Open) -> None:
    stream = open_stream(TEXTS)
    stream.take(4)
    assert identity(stream.all()) == identity(open_stream(TEXTS, shuffle=False).take(10))
    assert stream.cursor == PromptCursor(epoch=0, position=4)


def test_seeds_do_not_depend_on_the_order(open_stream: Open) -> None:
    shuffled, in_order = (open_stream(TEXTS, shuffle=shuffle).take(20) for shuffle in (True, False))
    assert {p.sequence_id: p.seed for p in shuffled} == {p.sequence_id: p.seed for p in in_order}


@given(
    st.integers(), st.integers(min_value=0), st.text(), st.integers(min_value=0), st.integers(min_value=0, max_value=3)
)
def test_every_part_of_a_seed_matters_and_it_fits_vllm(
    run_seed: int, epoch: int, prompt_id: str, sample_index: int, changed: int
) -> None:
    seed = prompt_seed(run_seed, epoch, prompt_id, sample_index)
    assert 0 <= seed <= np.iinfo(np.int64).max
    assert seed == prompt_seed(run_seed, epoch, prompt_id, sample_index)
    others = [(run_seed + 1, epoch, prompt_id, sample_index), (run_seed, epoch + 1, prompt_id, sample_index)]
    others += [(run_seed, epoch, prompt_id + "x", sample_index), (run_seed, epoch, prompt_id, sample_index + 1)]
    assert seed != prompt_seed(*others[changed])


# ---------------------------------------------------------------------------------------------------------- refusals


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message or "refused by the chat template" in message
    return message


@pytest.mark.parametrize("path", ["./none.jsonl", "/nowhere/x", "none.parquet", "part-*.json", "a/b/c", "~/none.jsonl"])
def test_a_missing_file_is_refused_without_asking_the_hub(open_stream: Open, path: str) -> None:
    message = refusal(lambda: open_stream(path))
    assert message.startswith("data.path: no such file")
    assert repr(path) in message


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_file_is_refused(open_stream: Open, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    assert refusal(lambda: open_stream(str(tmp_path / "empty.jsonl"))).startswith("data.path: ")


def test_an_empty_list_is_refused(open_stream: Open, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    assert refusal(lambda: open_stream(str(tmp_path / "empty.json"))).startswith("data.path: ")


def test_a_file_that_is_not_json_is_refused_with_its_row(open_stream: Open, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w1"}\n{oops\n')
    message = refusal(lambda: open_stream(str(tmp_path / "bad.jsonl")))
    assert message.startswith(f"data.path: {tmp_path / 'bad.jsonl'}: line 2, column 2: ")


def test_a_file_that_is_not_parquet_is_refused(open_stream: Open, tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_text("w1")
    assert refusal(lambda: open_stream(str(tmp_path / "bad.parquet"))).startswith("data.path: can't read")


def test_another_kind_of_file_is_refused(open_stream: Open, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt\nw1\n")
    assert "['.csv']" in refusal(lambda: open_stream(str(tmp_path / "rows.csv")))


def test_an_unknown_split_is_refused_with_those_there(open_stream: Open) -> None:
    message = refusal(lambda: open_stream(TEXTS, split="test"))
    assert "test" in message
    assert "train" in message


@pytest.mark.parametrize("knob", ["prompt_field", "answer_field", "id_field"])
def test_an_unknown_column_is_refused_with_those_there(open_stream: Open, knob: str) -> None:
    message = refusal(lambda: open_stream(TEXTS, key="evaluation.data", **{knob: "promt"}))
    assert message.startswith(f"evaluation.data.{knob}: no column 'promt'")
    assert "['answer', 'prompt']" in message


@pytest.mark.parametrize("prompt", ["", " \n", None, []])
def test_an_empty_prompt_is_refused_with_its_row(open_stream: Open, prompt: object) -> None:
    message = refusal(lambda: open_stream([{"prompt": "w1"}, {"prompt": prompt}]))
    assert message.startswith("data.prompt_field: row 1 is empty")


@pytest.mark.parametrize("prompt", [3, {"role": "user", "content": "w1"}, True])
def test_a_prompt_of_a_wrong_type_is_refused_with_its_row(open_stream: Open, prompt: object) -> None:
    message = refusal(lambda: open_stream([{"prompt": "w1"}, {"prompt": prompt}]))
    assert message.startswith("data.prompt_field: row 1 holds ")


@pytest.mark.parametrize(
    "messages", [["w1"], [{"role": "user"}], [{"role": "user", "content": ["w1"]}], [{"content": "w1"}]]
)
def test_a_message_of_a_wrong_shape_is_refused_with_its_row(
    open_stream: Open, chat_template: str, messages: object
) -> None:
    message = refusal(lambda: open_stream([{"prompt": messages}], chat_template=chat_template))
    assert message.startswith("data.prompt_field: row 0 holds the message")


def test_messages_without_a_chat_template_are_refused(open_stream: Open) -> None:
    message = refusal(lambda: open_stream([{"prompt": [{"role": "user", "content": "w1"}]}]))
    assert "no chat template" in message


def test_messages_the_template_refuses_are_refused_with_their_row(open_stream: Open) -> None:
    rows = [{"prompt": [{"role": "user", "content": "w1"}]}]
    message = refusal(lambda: open_stream(rows, chat_template="{{ raise_exception('roles must alternate') }}"))
    assert message == "data.prompt_field: row 0 is refused by the chat template: roles must alternate"


def test_a_prompt_longer_than_the_context_is_refused_with_what_to_change(open_stream: Open) -> None:
    rows = [{"prompt": "w1"}, {"prompt": "w1 w2 w3 w4"}]
    message = refusal(lambda: open_stream(rows, max_prompt_tokens=3))
    assert message.startswith("data.prompt_field: row 1 has 4 tokens, expected 1 to 3")
    assert "sampling.max_new_tokens" in message
    assert len(open_stream(rows, max_prompt_tokens=4)) == 2


def test_repeated_ids_are_refused_with_both_rows(open_stream: Open) -> None:
    rows = [{"prompt": "w1", "id": "a"}, {"prompt": "w2", "id": "b"}, {"prompt": "w3", "id": "a"}]
    message = refusal(lambda: open_stream(rows, id_field="id"))
    assert message.startswith("data.id_field: rows 0 and 2 both have 'a'")


@pytest.mark.parametrize("prompt_id", ["", None, 1.5, True, "x" * 129])
def test_an_id_that_is_no_name_is_refused_with_its_row(open_stream: Open, prompt_id: object) -> None:
    rows = [{"prompt": "w1", "id": prompt_id}]
    assert refusal(lambda: open_stream(rows, id_field="id")).startswith("data.id_field: row 0 holds")


def test_a_cursor_past_the_rows_is_refused(open_stream: Open) -> None:
    message = refusal(lambda: open_stream(TEXTS, cursor=PromptCursor(position=10)))
    assert message.startswith("data.path: ")


def test_a_hub_that_can_not_be_reached_is_one_line(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    program = (
        "from transformers import AutoTokenizer; from common.config import Data; from trainer.prompts import *\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})\n"
        "try: PromptStream(Data(path='nobody/nothing'), tokenizer, seed=0, max_prompt_tokens=9)\n"
        "except UserError as error: print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=True)
    (message,) = ran.stdout.splitlines()
    assert message.startswith("data.path: can't read 'nobody/nothing' from the Hugging Face hub: ")
    assert message.endswith("expected a JSON, JSONL or Parquet file, a glob of them, or the name of a hub dataset")


def test_what_is_left_out_is_given_out_no_more_and_all_others_keep_their_places(open_stream: Open) -> None:
    whole, lacking = (open_stream(TEXTS, samples_per_prompt=2) for _ in range(2))
    lacking.leave_out("3", 1)
    for _ in range(4):  # over an epoch's end
        wanted = [(p.prompt_id, p.epoch, p.sample_index, p.seed) for p in whole.take(4)]
        taken = [(p.prompt_id, p.epoch, p.sample_index, p.seed) for p in lacking.take(4)]
        assert taken == [each for each in wanted if (each[0], each[2]) != ("3", 1)]
        assert lacking.cursor == whole.cursor


def test_a_stream_that_goes_back_gives_the_same_again(open_stream: Open) -> None:
    stream = open_stream(TEXTS)
    stream.take(3)
    cursor, wanted = stream.cursor, [prompt.seed for prompt in stream.peek(9)]
    stream.take(12)
    stream.go_to(cursor)
    assert [prompt.seed for prompt in stream.take(9)] == wanted
