"""What a file says is what a prompt and an answer are, or the file is refused with its line and column."""

import json
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from common.config import Data
from common.errors import UserError
from trainer.answers import AnswerReader
from trainer.prompts import PromptCursor, PromptStream

Read = Callable[..., PromptStream]
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.fixture
def read(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Read:
    """The stream of the file of this name in ``tmp_path``, or of these rows."""

    def open_rows(
        rows: str | list[dict[str, Any]],
        *,
        chat_template: str | None = None,
        max_prompt_tokens: int = 100,
        cursor: PromptCursor | None = None,
        answers: AnswerReader | None = None,
        **settings: Any,
    ) -> PromptStream:
        if not isinstance(rows, str):
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptStream(
            Data(path=str(tmp_path / (rows if isinstance(rows, str) else "rows.jsonl")), **settings),
            make_tokenizer(chat_template=chat_template),
            seed=0,
            max_prompt_tokens=max_prompt_tokens,
            cursor=cursor,
            answers=answers,
        )

    return open_rows


def answers(stream: PromptStream) -> list[str | None]:
    return [prompt.answer for prompt in stream.all()]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_column(path: Path, text: str) -> None:
    rows = Dataset.from_dict({"prompt": [text]})
    if path.suffix == ".parquet":
        rows.to_parquet(str(path))
    else:
        rows.to_json(str(path))


# ------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    "values",
    [
        ["2024-03-01", "2024-03-02"],
        ["12:30:00", "2024-03-01T10:00:00Z"],
        ["007", "1.50", "true", "null"],
        [3, 2.5, 100],
        [100, 3, 2.5],
        [123456789012345678, 0.1],
        [3, "three", None],
        [2**70, -1],
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_answers_are_what_the_file_says(read: Read, tmp_path: Path, values: list[Any], as_list: bool) -> None:
    rows = [{"prompt": "w1", "answer": value} for value in values]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    expected = [value if isinstance(value, str | None) else str(value) for value in values]
    assert answers(read("list.json" if as_list else rows, answer_field="answer")) == expected


def test_a_number_keeps_its_digits(read: Read, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1", "answer": 29.00}\n{"prompt": "w1", "answer": 0.10}\n')
    assert answers(read("rows.jsonl", answer_field="answer")) == ["29.00", "0.10"]


def test_gaps_of_pandas_are_rows_without_an_answer_and_its_whole_numbers_are_whole(read: Read, tmp_path: Path) -> None:
    rows = {"prompt": ["w1", "w2", "w3"], "answer": [3.0, float("nan"), 2.5]}
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert answers(read("rows.parquet", answer_field="answer")) == ["3", None, "2.5"]


def test_a_list_of_one_assistant_message_is_its_text(read: Read) -> None:
    rows = [{"prompt": "w1", "completion": [{"role": "assistant", "content": "blue"}]}]
    assert answers(read(rows, answer_field="completion")) == ["blue"]


@pytest.mark.parametrize("value", [["blue", "red"], {"text": "blue"}, True, [], [{"role": "user", "content": "blue"}]])
def test_another_kind_of_answer_is_refused_with_row_and_column(read: Read, value: object) -> None:
    rows = [{"prompt": "w1", "answer": "x"}, {"prompt": "w2", "answer": value}]
    message = refusal(lambda: read(rows, answer_field="answer"))
    assert message.startswith("data.answer_field: row 1 holds ")
    assert message.endswith("expected text, a number or a list of one assistant message")


def test_a_time_of_a_typed_file_is_refused(read: Read, tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": ["w1"], "answer": [date(2024, 3, 1)]}).to_parquet(str(tmp_path / "rows.parquet"))
    message = refusal(lambda: read("rows.parquet", answer_field="answer"))
    assert message.startswith("data.answer_field: row 0 holds the time 2024-03-01")


def test_an_id_may_be_a_number_in_one_row_and_text_in_another(read: Read) -> None:
    stream = read([{"prompt": "w1", "id": 1}, {"prompt": "w2", "id": "b"}], id_field="id")
    assert [prompt.prompt_id for prompt in stream.all()] == ["1", "b"]


def test_a_column_that_is_called_json_holds_text(read: Read, tmp_path: Path) -> None:
    Dataset.from_dict({"json": ['{"prompt": "w2"}']}).to_parquet(str(tmp_path / "rows.parquet"))
    assert "no column 'prompt'" in refusal(lambda: read("rows.parquet"))
    assert len(read("rows.parquet", prompt_field="json")) == 1


def test_a_column_that_begins_late_is_found(read: Read) -> None:
    rows = [{"prompt": "w1"}] * 150 + [{"prompt": "w1", "answer": "x"}]
    assert answers(read(rows, answer_field="answer"))[-1] == "x"


# ------------------------------------------------------------------------------------------------------ assistant turns


def test_a_prompt_that_holds_its_answer_is_refused_with_the_setting_that_uses_it(
    read: Read, chat_template: str
) -> None:
    message = refusal(lambda: read([{"prompt": CHAT}], chat_template=chat_template))
    assert message.startswith("data.prompt_field: row 0 ends with an assistant message")
    assert "data.last_turn_is_answer" in message


def test_the_last_turn_is_the_answer_where_that_is_set(
    read: Read, chat_template: str, make_tokenizer: Callable[..., Any]
) -> None:
    (prompt,) = read([{"prompt": CHAT}], chat_template=chat_template, last_turn_is_answer=True).all()
    assert prompt.answer == "w2"
    assert make_tokenizer().decode(prompt.token_ids) == "user w1 assistant"


@pytest.mark.parametrize("prompt", ["w1", CHAT[:1]])
def test_a_row_without_such_a_turn_is_refused_then(read: Read, chat_template: str, prompt: object) -> None:
    message = refusal(lambda: read([{"prompt": prompt}], chat_template=chat_template, last_turn_is_answer=True))
    assert message.startswith("data.prompt_field: row 0 does not end with an assistant message")


def test_an_answer_has_one_source() -> None:
    with pytest.raises(ValueError, match="answer_field must be left out if last_turn_is_answer is set"):
        Data(path="x", answer_field="answer", last_turn_is_answer=True)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["same.jsonl", "same.parquet"])
def test_a_file_with_the_same_name_size_and_time_is_read_again(read: Read, tmp_path: Path, name: str) -> None:
    seen = []
    for text in ("w1", "w2"):
        write_column(tmp_path / name, text)
        os.utime(tmp_path / name, (1_000_000_000, 1_000_000_000))
        seen.append(read(name).all()[0].token_ids.tolist())
    assert seen[0] != seen[1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_name_is_a_pattern_only_if_no_file_has_it(read: Read, tmp_path: Path, suffix: str) -> None:
    write_column(tmp_path / f"set[1].{suffix}", "w1 w1")
    write_column(tmp_path / f"set1.{suffix}", "w2")
    assert read(f"set[1].{suffix}").all()[0].token_ids.size == 2
    assert read(f"set[12].{suffix}").all()[0].token_ids.size == 1


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"prompt": "w1"}\n\n{"prompt": "café"}\n'.encode("latin-1"), "line 3, column 16: byte 0xe9 is not UTF-8"),
        (b'{"prompt": "w1"}\n{"prompt": "w2",}\n', "line 2, column 17: "),
        (b'[{"prompt": "w1"},\n {"prompt" "w2"}]', "line 2, column 12: "),
        (b'{"prompt": "w1"}\n"w2"\n', "line 2 holds 'w2', expected an object"),
        (b'[{"prompt": "w1"}, 3]', "row 1 holds 3, expected an object"),
        (b"\xff\xfe{\x00", "line 1, column 1: byte 0xff is not UTF-8"),
    ],
)
def test_what_can_t_be_read_is_named_with_file_line_and_column(
    read: Read, tmp_path: Path, content: bytes, place: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    assert refusal(lambda: read("bad.jsonl")).startswith(f"data.path: {tmp_path / 'bad.jsonl'}: {place}")


def test_a_byte_order_mark_and_empty_lines_are_no_part_of_a_row(read: Read, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "w1"}\r\n\r\n{"prompt": "w2"}')
    assert len(read("rows.jsonl")) == 2


@pytest.mark.parametrize(("split", "rows"), [("train", [0, 1, 2, 3]), ("train[1:3]", [1, 2]), ("train[50%:]", [2, 3])])
def test_a_part_of_a_file_is_named_like_a_part_of_a_hub_dataset(read: Read, split: str, rows: list[int]) -> None:
    stream = read([{"prompt": "w1", "answer": number} for number in range(4)], answer_field="answer", split=split)
    assert answers(stream) == list(map(str, rows))


# ------------------------------------------------------------------------------------------------------------ too long


def test_rows_that_are_too_long_are_skipped_and_counted_and_the_others_keep_their_numbers(
    read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "w1 w2 w3"}, {"prompt": "w1"}, {"prompt": "w1 w2"}]
    stream = read(rows, too_long="skip", max_prompt_tokens=2)
    assert [(prompt.prompt_id, prompt.token_ids.size) for prompt in stream.all()] == [("1", 1), ("2", 2)]
    assert "data: skipped 1 of 3 rows, which are too long" in caplog.text


def test_a_row_whose_answer_is_too_long_is_skipped_too(read: Read, make_tokenizer: Callable[..., Any]) -> None:
    rows = [{"prompt": "w1", "answer": "w1 w2 w3"}, {"prompt": "w2", "answer": "w1"}]
    reader = AnswerReader(tokenizer=make_tokenizer(), stop_token_ids=(), max_tokens=2, refuses_too_long=False)
    (prompt,) = read(rows, answer_field="answer", too_long="skip", answers=reader).all()
    assert prompt.prompt_id == "1"
    assert np.size(prompt.answer_token_ids) == 2


def test_that_nothing_is_left_is_refused(read: Read) -> None:
    message = refusal(lambda: read([{"prompt": "w1 w2"}], too_long="skip", max_prompt_tokens=1))
    assert message.startswith("data.too_long: all 1 rows are too long")


# -------------------------------------------------------------------------------------------------------------- resume


def test_a_run_does_not_go_on_with_other_rows(read: Read) -> None:
    cursor = read([{"prompt": "w1"}, {"prompt": "w2"}]).cursor
    read([{"prompt": "w1"}, {"prompt": "w2"}], cursor=cursor)
    message = refusal(lambda: read([{"prompt": "w1"}, {"prompt": "w3"}], cursor=cursor))
    assert message.startswith("data.path: ")
    assert "has changed since the run started" in message
