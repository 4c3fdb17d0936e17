from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.config import Data
from common.errors import UserError
from trainer.answers import AnswerReader
from trainer.prompts import PromptStream

EOS_ID, USER_ID = 1, 3
CHAT = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} "
    "{% if message.role == 'assistant' %}<eos> w9 {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def read(make_tokenizer: Callable[..., Any]) -> Callable[..., list[list[int]]]:
    def read_answers(
        *answers: object,
        prompt: Any = "w1",
        template: str | None = None,
        max_tokens: int = 9,
        stops: tuple[int, ...] = (),
    ) -> list[list[int]]:
        reader = AnswerReader(
            tokenizer=make_tokenizer(chat_template=template), stop_token_ids=stops, max_tokens=max_tokens
        )
        return reader([prompt] * len(answers), answers, range(len(answers)))

    return read_answers


@pytest.fixture
def ids_of(make_tokenizer: Callable[..., Any]) -> Callable[[str], list[int]]:
    return lambda text: make_tokenizer()(text).input_ids


MESSAGES = [{"role": "user", "content": "w1", "name": None}]


def test_an_answer_is_a_finished_text(read, ids_of) -> None:
    assert read("w2 w3", 4, "w5 <eos>") == [ids_of("w2 w3 <eos>"), [*ids_of("4"), EOS_ID], ids_of("w5 <eos>")]


def test_in_a_chat_it_is_what_the_template_writes_for_it_up_to_the_end_of_the_message(read, ids_of) -> None:
    assert read("w2 w3", prompt=MESSAGES, template=CHAT) == [ids_of("w2 w3 <eos>")]
    endless = CHAT.replace("<eos> w9 ", "")
    assert read("w2 w3", prompt=MESSAGES, template=endless) == [ids_of("w2 w3 <eos>")]


def test_the_models_own_stop_token_ends_a_message(read, ids_of) -> None:
    template = CHAT.replace("<eos>", "user")
    assert read("w2", prompt=MESSAGES, template=template, stops=(USER_ID,)) == [ids_of("w2 user")]


@pytest.mark.parametrize("missing", [None, "", " \n"])
def test_a_missing_answer_is_named_by_field_and_row(read, missing: object) -> None:
    with pytest.raises(UserError, match=r"^data.answer_field: row 1 has no answer"):
        read("w2", missing)


def test_an_answer_that_is_too_long_is_refused_and_not_cut(read) -> None:
    assert len(read("w2 w3", max_tokens=3)[0]) == 3
    with pytest.raises(UserError, match=r"row 0 has 3 tokens with its end token, expected at most 2; .*max_new_tokens"):
        read("w2 w3", max_tokens=2)


@pytest.mark.parametrize(("prompt", "template"), [("w1", None), (MESSAGES, CHAT)])
def test_an_answer_that_ends_twice_is_refused(read, prompt: Any, template: str | None) -> None:
    with pytest.raises(UserError, match="row 0 holds an end token before its end"):
        read("w2 <eos> w3", prompt=prompt, template=template)


def test_a_template_that_renders_no_continuation_is_refused(read) -> None:
    template = CHAT.replace("{% if add_generation_prompt %}assistant", "{% if add_generation_prompt %}system")
    with pytest.raises(UserError, match="row 0: the chat template does not render the answer as a continuation"):
        read("w2", prompt=MESSAGES, template=template)


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_stream_hands_out_each_prompts_own_answer(tmp_path, make_tokenizer, ids_of, as_chat: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "w{n}", "answer": "w{n + 10} w1"}}\n' for n in range(5)))
    tokenizer = make_tokenizer(chat_template=CHAT)
    stream = PromptStream(
        Data(path=str(path), answer_field="answer", as_chat=as_chat),
        tokenizer,
        seed=0,
        max_prompt_tokens=10,
        answers=AnswerReader(tokenizer=tokenizer, stop_token_ids=(), max_tokens=9),
    )
    for prompt in stream.take(5):
        assert prompt.answer_token_ids is not None
        assert prompt.answer_token_ids.dtype == np.int32
        assert prompt.answer_token_ids.tolist() == ids_of(f"w{int(prompt.prompt_id) + 10} w1 <eos>")
