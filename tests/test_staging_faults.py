"""What goes wrong while shards are staged: bad sources, changed copies, full and failing disks, folders that cannot be."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from clips.errors import InputError
from clips.files import whole_file
from clips.manifest import ShardEntry, tar_path
from loaders import store
from loaders.staging import Stager
from loaders.store import Store
from tests.packing import stamps
from tests.staging import Reader, copies_in, expected, make_shards, names, staged


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def shards(source: Path) -> list[ShardEntry]:
    return make_shards(source)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


# Bad shards and changed copies


@pytest.mark.parametrize("fault", ["a byte", "shorter", "longer", "missing"])
def test_a_source_that_is_not_the_manifests_is_not_staged_and_said(
    fault: str, source: Path, shards: list[ShardEntry], folder: Path, log: Callable[[], list[str]]
) -> None:
    path = tar_path(source, "train", shards[1].name)
    blob = path.read_bytes()
    spoilt = {"a byte": blob[:-1] + bytes([blob[-1] ^ 1]), "shorter": blob[:-1], "longer": blob + b"x"}
    path.write_bytes(spoilt[fault]) if fault in spoilt else path.unlink()
    reader = staged(source, shards, folder)
    assert set(reader.told) == {shards[0].name, shards[2].name}
    assert copies_in(folder).keys() == {f"{shard.tar_sha256}.tar" for shard in (shards[0], shards[2])}
    said = {
        "a byte": "its sha256 is not the manifest's. Run python -m convert verify on its folder.",
        "shorter": "5000 bytes; the manifest promises 5001. Run python -m convert verify on its folder.",
        "longer": "more than 5001 bytes; the manifest promises 5001. Run python -m convert verify on its folder.",
        "missing": "cannot be read (No such file or directory). Look whether it is there and may be read.",
    }
    assert log() == [f"{path}: {said[fault]} It is not staged."]


@pytest.mark.parametrize("change", ["longer", "shorter, its time as before", "a byte", "removed"])
def test_a_changed_copy_is_said_and_copied_again(
    change: str, source: Path, shards: list[ShardEntry], folder: Path, log: Callable[[], list[str]]
) -> None:
    path = staged(source, shards, folder).told[shards[1].name]
    blob = path.read_bytes()
    others = {name: stamp for name, stamp in stamps(folder).items() if path.name not in name}
    log_before = len(log())
    if change == "removed":
        path.unlink()
    else:
        before = path.stat().st_mtime_ns
        path.write_bytes({"longer": blob + b"x", "a byte": b"x" + blob[1:]}.get(change, blob[1:]))
        if "time" in change:  # as on a file system that keeps whole seconds
            os.utime(path, ns=(before, before))
    reader = Reader(source, shards, folder)
    reader.stager.start()
    reader.wait(*names(shards))
    reader.wait_for_end()
    reader.stager.close()
    assert copies_in(folder) == expected(source, shards)
    assert others.items() <= stamps(folder).items()
    said = [f"{path}: changed since it was staged; train shard {shards[1].name} is copied again unless its sha256 is right"]
    assert log()[log_before:-1] == ([] if change == "removed" else said)


def test_a_changed_copy_is_not_used_where_it_cannot_be_copied_again(source: Path, shards: list[ShardEntry], folder: Path) -> None:
    path = staged(source, shards, folder).told[shards[1].name]
    path.write_bytes(b"x" * shards[1].tar_bytes)
    tar_path(source, "train", shards[1].name).unlink()
    assert set(staged(source, shards, folder).told) == {shards[0].name, shards[2].name}


def test_a_copy_that_was_only_touched_is_read_and_not_written_again(source: Path, shards: list[ShardEntry], folder: Path) -> None:
    path = staged(source, shards, folder).told[shards[1].name]
    inode = path.stat().st_ino
    os.utime(path, ns=(time.time_ns(), 1_700_000_000_123_456_789))
    assert not Store(folder).holds(shards[1])
    tar_path(source, "train", shards[1].name).unlink()
    assert set(staged(source, shards, folder).told) == set(names(shards))
    assert path.stat().st_ino == inode and Store(folder).holds(shards[1])


# No room


def test_what_does_not_fit_stays_and_is_said_in_one_line(
    source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    others = make_shards(source, 2, split="val")
    staged(source, others, folder, "val")
    before, lines_before = stamps(folder), len(log())
    # 5000, 5001 and 5002 bytes to come, as many as the first two need are free beside 10001 of others
    monkeypatch.setattr(Store, "room_bytes", lambda self: 20_002 - sum(path.stat().st_size for path in self.copies.glob("*.tar")))
    reader = staged(source, shards, folder)
    assert set(reader.told) == {shards[0].name, shards[1].name}
    assert before.items() <= stamps(folder).items()  # nothing gives way
    assert reader.stager.describe()[1] == (
        f"train: no room for train-000002 (1 shard, 0.0 MB) in the 0.0 MB that may be used there: read from {source}"
    )
    assert log()[lines_before:] == []  # it was known at the start


@contextmanager
def full_disk(path: Path, fault: int = errno.ENOSPC) -> Iterator[BinaryIO]:
    """Takes the first bytes of a file and then fails as a full disk does."""
    with whole_file(path) as file:

        class Full:
            def write(self, chunk: bytes) -> None:
                file.write(chunk[:100])
                file.flush()
                raise OSError(fault, os.strerror(fault))

        yield Full()  # type: ignore[misc]  # all that is used of a file


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_becomes_full_in_the_middle_ends_no_training(
    fault: int, source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    full_at = f"{shards[1].tar_sha256}.tar"
    monkeypatch.setattr(store, "whole_file", lambda path: full_disk(path, fault) if path.name == full_at else whole_file(path))
    reader = staged(source, shards, folder)
    assert set(reader.told) == {shards[0].name}
    assert copies_in(folder) == expected(source, shards[:1])
    assert log() == [f"train: {Store(folder).copies} is full; no room for train-000001 … train-000002 (2 shards, 0.0 MB): read from {source}"]
    monkeypatch.undo()
    assert set(staged(source, shards, folder).told) == set(names(shards))


def test_a_disk_that_fails_ends_staging_with_one_line(
    source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(store, "whole_file", lambda path: full_disk(path, errno.EIO))
    assert staged(source, shards, folder).told == {}
    assert copies_in(folder) == {}
    copy = Store(folder).path(shards[0])
    assert log() == [f"train: {copy}: Input/output error; what is not staged yet is read from {source}"]


def test_a_disk_that_is_full_at_the_start_ends_no_training(source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    reader = staged(source, shards, folder)
    assert reader.told == {}
    assert reader.stager.describe() == [f"train: {folder} is full; no room for train-000000 … train-000002 (3 shards, 0.0 MB): read from {source}"]


def test_a_part_of_the_disk_is_left_to_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Store(folder)
    for total, free, room in [(1 << 50, 8 << 30, 3 << 30), (20 << 30, 8 << 30, 7 << 30), (20 << 30, 0, -(1 << 30))]:
        usage = SimpleNamespace(total=total, free=free)
        monkeypatch.setattr(shutil, "disk_usage", {made.copies: usage}.get)
        assert made.room_bytes() == room
        assert made.room_bytes(reserve=False) == free


# The folder


def refusal(folder: Path, source: Path, shards: list[ShardEntry]) -> str:
    with pytest.raises(InputError) as error:
        Stager(source, "train", shards, folder, lambda name, path: None).start()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_store_is_its_users_alone(source: Path, shards: list[ShardEntry], folder: Path) -> None:
    staged(source, shards, folder)
    assert (folder / f"gesture-clips-{os.geteuid()}").stat().st_mode & 0o777 == 0o700


def test_a_store_of_somebody_else_is_refused(source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    text = f"--stage-dir {folder}/gesture-clips-{me + 1}: expected your own folder; found a folder of user {me}. Give another place to stage into."
    assert refusal(folder, source, shards) == text


def test_a_link_in_the_stores_place_is_refused(source: Path, shards: list[ShardEntry], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    folder.mkdir()
    (folder / f"gesture-clips-{os.geteuid()}").symlink_to(tmp_path / "mine")
    assert "expected your own folder; found no folder of user " in refusal(folder, source, shards)
    assert not list((tmp_path / "mine").iterdir())


def test_a_folder_that_cannot_be_is_refused(source: Path, shards: list[ShardEntry], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nothing = "nothing can be staged there"
    places = {tmp_path / "file": "expected a folder to stage into; found a file"}
    places |= {tmp_path / "file" / "below": f"{nothing} (Not a directory)", Path("/proc/x"): f"{nothing} (No such file or directory)"}
    for folder, reason in places.items():
        assert refusal(folder, source, shards) == f"--stage-dir {folder}: {reason}. Give a folder on the node's own disk that you may write to."


def test_an_unset_variable_is_refused(source: Path, shards: list[ShardEntry], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(Path(""), source, shards) == "--stage-dir: expected a folder on the node's own disk; found an empty name. Is $TMPDIR set here?"
    assert not list(tmp_path.glob("gesture-clips-*"))
