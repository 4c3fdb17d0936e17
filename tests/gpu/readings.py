"""What Hugging Face says of a text, row by row, to hold engines against.

n = tokens of a text, k = length of a top list, V = vocabulary. Row j is the distribution of token j + 1.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.sequence import Floats, Ids, TopLogprobs
from tests.gpu.context import Context


def hugging_face(context: Context, folder: Path, dtype: torch.dtype) -> Callable[[Ids], Tensor]:
    """[n, V] nats, float32 on the device: one pass of the folder's model without a cache, computed in ``dtype``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(context.device).eval()

    @torch.inference_mode()
    def rows_of(text: Ids) -> Tensor:
        logits_nV = model(input_ids=torch.from_numpy(text).long()[None].to(context.device), use_cache=False).logits[0]
        return logits_nV.float().log_softmax(dim=-1)

    return rows_of


def rows_at(expected_nV: Tensor, rows: TopLogprobs, shifts: Sequence[int] = (0,)) -> Floats | list[Floats]:
    """[n, k] Hugging Face's log-probs of the engine's ids; with several ``shifts``, a list of those of the rows so far
    behind (around the ends).
    """
    assert len(expected_nV) == len(rows), (len(expected_nV), len(rows))
    ids_nk = torch.from_numpy(rows.token_ids).long().to(expected_nV.device)
    found = [expected_nV.roll(-shift, dims=0).gather(1, ids_nk).cpu().numpy() for shift in shifts]
    return found if len(found) > 1 else found[0]


def differences(rows: TopLogprobs, expected_nk: Floats) -> Floats:
    """[n, k] |difference| in nats; inf where the engine's row is not a number."""
    found = np.abs(rows.logprobs - expected_nk)
    return np.where(np.isnan(found), np.float32(np.inf), found)
