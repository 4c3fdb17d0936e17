"""Mixed sequences as one file, for sequences in a checkpoint that are collected and not trained yet.

The file is a NumPy archive without pickles. It has one entry for every array of every sequence, and one with all other
values as JSON.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from common.sequence import MixedSequence, Prompt, TopLogprobs

_RECORDS: dict[str, type[Any]] = {"prompt": Prompt, "student_top": TopLogprobs, "teacher_top": TopLogprobs}
_SCALARS = "scalars"


def write_sequences(path: Path, sequences: Sequence[MixedSequence]) -> None:
    """Write the sequences to a new file."""
    arrays: dict[str, Any] = {}
    scalars: list[dict[str, object]] = []
    for number, sequence in enumerate(sequences):
        leaves = dict(_leaves(sequence))
        arrays |= {f"{number}.{name}": leaf for name, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
        scalars.append({name: leaf for name, leaf in leaves.items() if not isinstance(leaf, np.ndarray)})
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **{_SCALARS: np.array(json.dumps(scalars)), **arrays})


def read_sequences(path: Path) -> list[MixedSequence]:
    """The sequences that ``write_sequences`` wrote, in the same order."""
    with np.load(path, allow_pickle=False) as archive:
        leaves_by_sequence: list[dict[str, object]] = json.loads(str(archive[_SCALARS]))
        for entry in archive.files:
            number, _, name = entry.partition(".")
            if entry != _SCALARS:
                leaves_by_sequence[int(number)][name] = archive[entry]
    sequences: list[MixedSequence] = [_built(MixedSequence, leaves) for leaves in leaves_by_sequence]
    return sequences


def _leaves(record: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name in _RECORDS:
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _built(record: type[Any], leaves: dict[str, object], prefix: str = "") -> Any:
    return record(
        **{
            field.name: _built(_RECORDS[field.name], leaves, f"{prefix}{field.name}.")
            if field.name in _RECORDS
            else leaves[prefix + field.name]
            for field in fields(record)
        }
    )
