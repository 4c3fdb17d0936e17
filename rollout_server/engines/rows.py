"""vLLM's flat lists of log-probs -> arrays. Knows no vLLM, only the shape of its lists.

A flat list holds its rows one after the other, each k + 1 entries long: the token itself, then the k best.

A prompt's list begins with an empty row, for its first token, and ends with the row of its last one. In between vLLM's
two model runners differ. V1 gives every token a row; those of tokens whose predecessor was cached hold what lay in
memory. V2 has no rows for these. So rows are found from the end, and what is missing must be read without the cache.

n = tokens, k = length of a top list.
"""

from typing import Protocol

import numpy as np

from common.sequence import Floats, Ids, TopLogprobs


class FlatRows(Protocol):
    """What is used of vLLM's ``FlatLogprobs``."""

    start_indices: list[int]  # [rows] of each row's first entry
    end_indices: list[int]  # [rows]
    token_ids: list[int]  # [entries]
    logprobs: list[float]  # [entries] nats


def top_rows(flat: FlatRows, first: int, end: int, k: int) -> TopLogprobs:
    """Rows first..end-1 without each row's leading own entry.

    Where vLLM merged deltas that nobody had taken yet, it drops the second entry of an own token among the k best; such
    a row is one entry short and out of order at its head.
    """
    starts, ends = np.asarray(flat.start_indices[first:end]), np.asarray(flat.end_indices[first:end])
    lengths, wanted = ends - starts, slice(starts[0], ends[-1])
    token_ids, logprobs = np.asarray(flat.token_ids[wanted], np.int32), np.asarray(flat.logprobs[wanted], np.float32)
    entries = (starts - starts[0] + (lengths == k + 1))[:, None] + np.arange(k)
    top_ids, top_logprobs = token_ids[entries], logprobs[entries]
    if (lengths == k).any():
        order = np.argsort(-top_logprobs, axis=1, kind="stable")
        top_ids, top_logprobs = np.take_along_axis(top_ids, order, 1), np.take_along_axis(top_logprobs, order, 1)
    return TopLogprobs(top_ids, top_logprobs)


def own_logprobs(flat: FlatRows) -> Floats:
    """[rows] Of each row's own token."""
    return np.asarray(flat.logprobs, np.float32)[flat.start_indices]


def prompt_rows(flat: FlatRows, text: Ids, start: int, k: int, *, num_cached: int) -> TopLogprobs | None:
    """Rows of the tokens ``text[start:]``, or None where one of them is not there.

    ``num_cached`` is vLLM's count of tokens it did not compute: a row follows from the state of the token before, so
    that of token j is valid where fewer than j tokens were cached. The count is taken when a request begins; one that
    vLLM interrupted may later find more of itself in the cache, or less. What is there is therefore looked at too: how
    many rows, and whether each is its token's.
    """
    num_missing = text.size - len(flat.start_indices)
    if start <= max(num_missing, num_cached):
        return None
    first, end = start - num_missing, len(flat.start_indices)
    own_ids = [flat.token_ids[entry] for entry in flat.start_indices[first:]]
    if own_ids != text[start:].tolist():
        return None
    return top_rows(flat, first, end, k)
