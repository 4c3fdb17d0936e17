from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.sequence_files import read_sequences, write_sequences


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for field in fields(expected):
        value, wanted = getattr(found, field.name), getattr(expected, field.name)
        if is_dataclass(wanted):
            assert_same(value, wanted)
        elif isinstance(wanted, np.ndarray):
            assert value.dtype == wanted.dtype, field.name
            np.testing.assert_array_equal(value, wanted, err_msg=field.name)
        else:
            assert value == wanted, field.name


def test_sequences_come_back_bit_for_bit_and_in_order(tmp_path: Path, make_mixed_sequence) -> None:
    given = make_mixed_sequence(prompt_id="given", switches=(), answer="6 é")
    prompt = replace(given.prompt, answer_token_ids=np.arange(3, dtype=np.int32), seed=2**62 + 1)
    sequences = [
        make_mixed_sequence(prompt_id="b", num_tokens=12, switches=(2, 7), guidance_tokens=1, weight_version=3),
        make_mixed_sequence(prompt_id="a", num_tokens=5, switches=(0,), k=4, finish_reason="length"),
        replace(given, prompt=prompt),
    ]
    write_sequences(tmp_path / "ahead.npz", sequences)
    found = read_sequences(tmp_path / "ahead.npz")
    assert [sequence.sequence_id for sequence in found] == ["b.0.0", "a.0.0", "given.0.0"]
    for sequence, expected in zip(found, sequences, strict=True):
        assert_same(sequence, expected)
