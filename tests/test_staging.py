"""Shards on the node's own disk: one copy for all processes, complete or absent, whoever is killed or closed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import pytest

from clips.claim import HeldError
from clips.manifest import ShardEntry, tar_path
from loaders import staging, store
from loaders.staging import Stager
from loaders.store import Store, chunks_of
from tests.packing import stamps
from tests.staging import Gate, Reader, copies_in, expected, make_shards, names, put_claim, put_half, staged

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "POLL_S", 0.01)


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


def test_each_shard_is_copied_and_told_once(source: Path, shards: list[ShardEntry], folder: Path, log: Callable[[], list[str]]) -> None:
    reader = staged(source, shards, folder)
    assert set(reader.told) == set(names(shards))
    for shard in shards:
        assert reader.told[shard.name].read_bytes() == tar_path(source, "train", shard.name).read_bytes()
    assert copies_in(folder) == expected(source, shards)
    copies = folder / f"gesture-clips-{os.geteuid()}" / "by-sha256"
    assert reader.stager.describe() == [f"train: 0 of 3 shards (0.0 MB) are local in {copies}; 3 (0.0 MB) are copied there meanwhile"]
    assert len(log()) == 1 and log()[0].startswith("train: all 3 shards are local, ")


def test_what_is_local_is_told_before_start_returns_and_not_written_again(source: Path, shards: list[ShardEntry], folder: Path) -> None:
    staged(source, shards, folder)
    before = stamps(folder)
    for path in source.rglob("*.tar"):
        path.unlink()  # nothing of the source is read
    reader = Reader(source, shards, folder)
    reader.stager.start()
    assert set(reader.told) == set(names(shards)) and reader.stager._thread is None
    assert reader.stager.describe()[0].startswith("train: 3 of 3 shards (0.0 MB) are local in ")
    assert stamps(folder) == before
    reader.stager.close()


def test_splits_and_data_sets_share_a_store(source: Path, shards: list[ShardEntry], folder: Path) -> None:
    val = make_shards(source, 2, split="val")
    staged(source, shards, folder)
    before = stamps(folder)
    reader = staged(source, val, folder, "val")
    assert set(reader.told) == set(names(val))
    assert before.items() <= stamps(folder).items() and len(list(folder.rglob("*.tar"))) == 5


@pytest.mark.parametrize("size", [0, 1, 4095])
def test_shards_of_any_size(size: int, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 1365)
    monkeypatch.setattr(store, "SYNC_BYTES", 2000)
    shards = make_shards(source, 3, size)
    assert set(staged(source, shards, folder).told) == set(names(shards))
    assert copies_in(folder) == expected(source, shards)


def test_a_split_without_shards_needs_nothing(source: Path, folder: Path) -> None:
    assert staged(source, [], folder).told == {}


# Several at once

STAGE = """
import json, sys, threading
from pathlib import Path
from clips.manifest import ShardEntry
from loaders import staging
from loaders.store import Store
staging.POLL_S = 0.01
source, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
shards = [ShardEntry(*entry) for entry in json.loads(sys.stdin.readline())]
copied, told, all_told = [], [], threading.Event()
write = Store._write
def counted(self, shard, *rest):
    copied.append(shard.name)
    write(self, shard, *rest)
Store._write = counted
def ready(name, path):
    assert path.is_file()
    told.append(name)
    if len(told) == count:
        all_told.set()
print("here", flush=True)
sys.stdin.readline()
stager = staging.Stager(source, "train", shards, folder, ready)
stager.start()
assert all_told.wait(60)
stager.close()
print(json.dumps([copied, told]))
"""


def start_process(code: str, source: Path, folder: Path, shards: list[ShardEntry]) -> subprocess.Popen[str]:
    """A process that imported all it needs, knows its shards and waits for a line."""
    words = [sys.executable, "-c", code, str(source), str(folder), str(len(shards))]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps([list(vars(shard).values()) for shard in shards]) + "\n")
    process.stdin.flush()
    return process


def test_processes_at_once_copy_each_shard_once(source: Path, folder: Path) -> None:
    shards = make_shards(source, 12, 300_000)
    processes = [start_process(STAGE, source, folder, shards) for _ in range(3)]
    assert [process.stdout.readline() for process in processes if process.stdout] == ["here\n"] * 3
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [json.loads(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    copied = [name for end in ends for name in end[0]]
    assert sorted(copied) == sorted(names(shards))
    assert all(sorted(end[1]) == sorted(names(shards)) for end in ends)
    assert copies_in(folder) == expected(source, shards)


def test_a_shard_that_another_copies_is_passed_over_and_noticed_later(
    source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, shards[0].name)
    first, second = Reader(source, shards, folder), Reader(source, shards, folder)
    first.stager.start()
    gate.wait()
    second.stager.start()
    second.wait(*names(shards[1:]))
    assert first.told == {} and set(second.told) == set(names(shards[1:]))
    before = stamps(folder, "*.tar")
    gate.opened.set()
    for reader in (first, second):
        reader.wait(*names(shards))
        reader.wait_for_end()
        reader.stager.close()
    assert before.items() <= stamps(folder).items()
    assert copies_in(folder) == expected(source, shards)


def test_a_shard_that_another_copies_is_waited_for_where_there_is_no_room_for_it(
    source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, shards[0].name)
    first, second = Reader(source, shards[:1], folder), Reader(source, shards, folder)
    first.stager.start()
    gate.wait()
    monkeypatch.setattr(Store, "room_bytes", lambda self: 0)
    second.stager.start()
    gate.opened.set()
    second.wait(shards[0].name)
    for reader in (first, second):
        reader.wait_for_end()
        reader.stager.close()
    assert set(second.told) == {shards[0].name}


HALF = """
import json, sys
from pathlib import Path
from clips.manifest import ShardEntry
from loaders import staging
shards = [ShardEntry(*entry) for entry in json.loads(sys.stdin.readline())]
def chunks(where, opened):
    yield Path(where).read_bytes()[:1000]
    print("in the middle", flush=True)
    sys.stdin.readline()
staging.chunks_of = chunks
stager = staging.Stager(Path(sys.argv[1]), "train", shards, Path(sys.argv[2]), print)
stager.start()
stager._thread.join()
"""


def test_the_next_run_finishes_what_a_killed_one_began(source: Path, shards: list[ShardEntry], folder: Path) -> None:
    process = start_process(HALF, source, folder, shards)
    assert process.stdout and process.stdout.readline() == "in the middle\n"
    process.kill()
    process.communicate()
    left = [name for name in copies_in(folder) if name.startswith(".")]
    assert len(left) == 2 and f".{shards[0].tar_sha256}.claim" in left
    assert set(staged(source, shards, folder).told) == set(names(shards))
    assert copies_in(folder) == expected(source, shards)


@pytest.mark.parametrize("silent_s", [0, 30])
def test_a_young_claim_is_waited_for_and_a_stale_one_taken_over(silent_s: float, source: Path, shards: list[ShardEntry], folder: Path) -> None:
    claim, half = put_claim(folder, shards[1], silent_s=silent_s), put_half(folder, shards[1])
    reader = Reader(source, shards, folder)
    reader.stager.start()
    reader.wait(shards[0].name, shards[2].name)
    assert shards[1].name not in reader.told and claim.exists() and half.exists()
    os.utime(claim, (time.time() - 61,) * 2)
    reader.wait(shards[1].name)
    reader.wait_for_end()
    reader.stager.close()
    assert copies_in(folder) == expected(source, shards)


def test_halves_are_removed_unless_their_claim_is_held(source: Path, shards: list[ShardEntry], folder: Path) -> None:
    strangers = make_shards(source, 2, 7000, split="test")
    put_half(folder, strangers[0])
    held = {put_half(folder, strangers[1]).name, put_claim(folder, strangers[1]).name}
    old, young = (Store(folder).copies / f".now.another-node.{pid}.0123abcd.tmp" for pid in (1, 2))
    for path in (old, young):
        path.touch()
    os.utime(old, (time.time() - 61,) * 2)
    staged(source, shards, folder)
    assert {name for name in copies_in(folder) if name.startswith(".")} == {*held, young.name}


def test_a_suspended_process_whose_half_was_taken_looks_again(source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, shards[0].name)
    reader = Reader(source, shards, folder)
    reader.stager.start()
    gate.wait()
    for half in Store(folder).copies.glob(".*.tmp"):
        half.unlink()
    gate.opened.set()
    reader.wait(*names(shards))
    reader.wait_for_end()
    reader.stager.close()
    assert copies_in(folder) == expected(source, shards)


def test_a_claim_says_what_its_holder_does(shards: list[ShardEntry], folder: Path) -> None:
    claim = put_claim(folder, shards[0])
    with pytest.raises(HeldError, match=f"{claim}: process 4711 on another-node copies this shard, its heartbeat is . s old"):
        Store(folder).add(shards[0], chunks_of("x", lambda: nullcontext(BytesIO())), "x", print)


# Closing


def test_closing_in_the_middle_of_a_shard_leaves_nothing_of_it(
    source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    gate = Gate(monkeypatch, shards[1].name)
    reader = Reader(source, shards, folder)
    reader.stager.start()
    gate.wait()
    assert len(list(Store(folder).copies.glob(".*"))) == 2
    begin = time.monotonic()
    reader.stager.close()
    assert time.monotonic() - begin < staging.CLOSE_S / 2
    reader.wait_for_end()
    assert set(reader.told) == {shards[0].name}
    assert copies_in(folder) == expected(source, shards[:1])
    assert log() == []
    reader.stager.close()


def test_closing_while_others_copy_ends_the_waiting(source: Path, shards: list[ShardEntry], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "POLL_S", 1000.0)
    claim = put_claim(folder, shards[0])
    reader = Reader(source, shards, folder)
    reader.stager.start()
    reader.wait(*names(shards[1:]))
    reader.stager.close()
    reader.wait_for_end()
    assert claim.exists()


@pytest.mark.parametrize("size", [0, 5000])
def test_a_file_server_that_hangs_is_not_waited_for_and_nobody_is_told_after_the_end(
    size: int, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "CLOSE_S", 0.01)
    shards = make_shards(source, 2, size)
    path = tar_path(source, "train", shards[0].name)
    blob = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    reader = Reader(source, shards, folder)
    reader.stager.start()
    with path.open("wb") as pipe:  # the stager reads on the other side now
        reader.stager.close()
        assert reader.stager._thread is not None and reader.stager._thread.is_alive()
        pipe.write(blob)
    reader.wait_for_end()
    assert reader.told == {}
    assert not [name for name in copies_in(folder) if name.startswith(".")] and not Store(folder).holds(shards[1])


def test_a_stager_that_was_not_started_can_be_closed(source: Path, shards: list[ShardEntry], folder: Path) -> None:
    stager = Stager(source, "train", shards, folder, lambda name, path: None)
    assert stager.describe() == []
    stager.close()
    assert not folder.exists()
