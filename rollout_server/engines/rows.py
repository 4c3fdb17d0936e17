"""Converts vLLM's flat lists of log-probs to arrays. Does not import vLLM, and knows only the layout of its lists.

A flat list holds one row after another. Each row has k + 1 entries: the token itself, then the k best.

A prompt's list starts with an empty row for its first token, and ends with the row of its last token. In between vLLM's
two model runners differ. V1 has a row for every token, but the rows after cached tokens hold uninitialized memory. V2
has no such rows. So rows are indexed from the end, and missing rows must be scored again without the cache.

n = tokens, k = length of a top-k list.
"""

from typing import Protocol

import numpy as np

from common.sequence import Floats, Ids, TopLogprobs


class FlatRows(Protocol):
    """The part of vLLM's ``FlatLogprobs`` that is used."""

    start_indices: list[int]  # [rows] of each row's first entry
    end_indices: list[int]  # [rows]
    token_ids: list[int]  # [entries]
    logprobs: list[float]  # [entries] nats


def top_rows(flat: FlatRows, first: int, end: int, k: int) -> TopLogprobs:
    """Rows first..end-1, each without its leading entry for the token itself.

    When vLLM merges output deltas that have not been consumed yet, a token that is also among the k best is listed only
    once. Such a row is one entry short, and its first entry is out of order.
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
    """[rows] The log-prob of each row's own token."""
    return np.asarray(flat.logprobs, np.float32)[flat.start_indices]


def prompt_rows(flat: FlatRows, text: Ids, start: int, k: int, *, num_cached: int) -> TopLogprobs | None:
    """Rows of the tokens ``text[start:]``, or None if one of them is missing.

    ``num_cached`` is vLLM's number of tokens that it did not compute. Token j's row is computed from the state of token
    j - 1, so it is valid if fewer than j tokens were cached. vLLM counts when a request starts. If the request is
    preempted, it may later find more or fewer of its tokens in the cache. Therefore the rows themselves are checked
    too: their number, and whether each belongs to its token.
    """
    num_missing = text.size - len(flat.start_indices)
    if start <= max(num_missing, num_cached):
        return None
    first, end = start - num_missing, len(flat.start_indices)
    own_ids = [flat.token_ids[entry] for entry in flat.start_indices[first:]]
    if own_ids != text[start:].tolist():
        return None
    return top_rows(flat, first, end, k)
