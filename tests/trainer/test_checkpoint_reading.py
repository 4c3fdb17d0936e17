"""A checkpoint that somebody else prepared runs nothing when it is read."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.checkpoint import load_tensors, save_tensors
from trainer.ranks import ALONE


@dataclass(frozen=True, slots=True)
class Trap:
    """Makes a file when it is unpickled."""

    path: Path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.5)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved, optimizer = model_and_optimizer()
    saved(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_tensors(tmp_path, saved, optimizer, {"last_epoch": 2, "rates": [0.1, None, "x"], "wide": (True, 1)}, ALONE)
    model, optimizer = model_and_optimizer()
    scheduler = load_tensors(tmp_path, model, optimizer, {"last_epoch": 0, "rates": [], "wide": None}, ALONE)
    assert scheduler == {"last_epoch": 2, "rates": [0.1, None, "x"], "wide": (True, 1)}
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), saved.parameters(), strict=True))


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "learner", *model_and_optimizer(), {}, ALONE)
    index = tmp_path / "learner" / ".metadata"
    index.write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(OSError, match=r"(?s)can't read .*which our checkpoints don't use"):
        load_tensors(tmp_path / "learner", *model_and_optimizer(), {}, ALONE)
    assert not (tmp_path / "trapped").exists()
    pickle.loads(index.read_bytes())
    assert (tmp_path / "trapped").exists(), "the trap does nothing"


def test_a_value_that_would_run_code_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "learner", *model_and_optimizer(), {"last_epoch": Trap(tmp_path / "trapped")}, ALONE)
    with pytest.raises(OSError, match=r"(?s)can't read .*[Ww]eights.only"):
        load_tensors(tmp_path / "learner", *model_and_optimizer(), {"last_epoch": 0}, ALONE)
    assert not (tmp_path / "trapped").exists()
