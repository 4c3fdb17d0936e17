import gc
import weakref
from collections.abc import Iterator

import pytest

from common.heap import freeze_heap


class Thing:
    pass


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_lives_is_left_out_of_collections_and_still_freed_when_dropped() -> None:
    old = Thing()
    freeze_heap()
    young = Thing()
    assert not any(each is old for each in gc.get_objects())
    assert any(each is young for each in gc.get_objects())
    dropped = weakref.ref(old)
    del old
    assert dropped() is None


def test_garbage_from_before_is_collected_first() -> None:
    ring = Thing()
    ring.itself = ring  # type: ignore[attr-defined]
    dropped = weakref.ref(ring)
    del ring
    freeze_heap()
    assert dropped() is None
