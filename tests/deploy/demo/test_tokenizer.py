from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deploy.demo.task import make_split
from deploy.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, SYMBOLS, UNKNOWN_ID, make_tokenizer

MODELS = Path(__file__).parents[3] / "deploy" / "demo" / "models"

ids = st.integers(min_value=0, max_value=31)


@pytest.fixture(scope="module", params=["made", "teacher", "student"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The tokenizer as it is made, and as it comes out of each shipped folder."""
    return make_tokenizer() if request.param == "made" else AutoTokenizer.from_pretrained(MODELS / request.param)


def test_there_are_32_ids_and_the_special_ones_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == len(SYMBOLS) == 32
    special_ids = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert special_ids == (PAD_ID, BOS_ID, EOS_ID, UNKNOWN_ID) == (0, 1, 2, 3)


def test_bos_comes_first_and_eos_is_never_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("7+3*8-2=").input_ids == [1, 11, 14, 7, 16, 12, 15, 6, 17]
    assert tokenizer("").input_ids == [BOS_ID]
    assert tokenizer("7=", add_special_tokens=False).input_ids == [11, 17]


@given(token_ids=st.lists(ids, max_size=60))
def test_every_sequence_of_ids_survives_the_way_to_text_and_back(
    tokenizer: PreTrainedTokenizerFast, token_ids: list[int]
) -> None:
    text = tokenizer.decode(token_ids)
    assert text == "".join(SYMBOLS[token_id] for token_id in token_ids)
    assert tokenizer(text, add_special_tokens=False).input_ids == token_ids


@given(token_ids=st.lists(ids, max_size=60))
def test_special_tokens_can_be_left_out_of_the_text(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> None:
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert text == "".join(SYMBOLS[token_id] for token_id in token_ids if token_id > UNKNOWN_ID)


def test_a_foreign_character_becomes_one_unknown_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("7 ÷\n", add_special_tokens=False).input_ids == [11, UNKNOWN_ID, UNKNOWN_ID, UNKNOWN_ID]


def test_the_task_needs_no_unknown_token(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(problem.prompt + problem.answer for problem in make_split().held_out)
    assert UNKNOWN_ID not in tokenizer(text).input_ids


def test_prompts_are_padded_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    padded = tokenizer(["7=", "7+3="], padding=True)
    assert padded.input_ids == [[PAD_ID, PAD_ID, BOS_ID, 11, 17], [BOS_ID, 11, 14, 7, 17]]
    assert padded.attention_mask == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
