"""What a long-lived process holds, and what the garbage collector makes of it."""

import gc


def freeze_heap() -> None:
    """Leave all that lives now out of garbage collections to come; whoever drops it frees it all the same.

    For the end of a process's set-up. Torch, transformers and Ray bring 400,000 objects: a full collection walks them
    for a quarter of a second and finds nothing, and a process that makes many objects has one every few seconds.
    """
    gc.collect()
    gc.freeze()
