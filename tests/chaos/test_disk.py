import errno
from pathlib import Path

import pytest

from tests.chaos.disk import can_mount, small_disk


def test_a_full_disk_takes_nothing_until_there_is_room_again(tmp_path: Path) -> None:
    if not can_mount(tmp_path / "probe"):
        pytest.skip("this user may not mount a tmpfs")
    folder = tmp_path / "traces"
    with small_disk(folder, mebibytes=1) as disk:
        disk.fill()
        with pytest.raises(OSError, match="No space left") as caught:
            (folder / "segment").write_bytes(bytes(10_000))
        assert caught.value.errno == errno.ENOSPC
        disk.make_room()
        (folder / "segment").write_bytes(bytes(10_000))
    assert list(folder.iterdir()) == []
