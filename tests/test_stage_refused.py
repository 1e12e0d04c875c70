"""What python -m loaders stage refuses or mends: manifests of others, bad bytes, full disks; each fault one line, nothing half written."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clips import command
from clips.errors import InputError
from clips.manifest import MANIFEST, ShardEntry, read_manifest, tar_path
from loaders import store
from loaders.source import open_source
from loaders.stage import StageConfig, stage
from loaders.store import Store
from tests.packing import stamps, tree
from tests.staging import put_claim

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http by curl")


@pytest.fixture
def shards(packed_once: Path, tmp_path: Path) -> Path:
    """Three shards of train and one of val, a copy to damage."""
    return Path(shutil.copytree(packed_once / "zstd", tmp_path / "shards"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO)
    return lambda: caplog.text


def copies(folder: Path) -> Path:
    return folder / f"gesture-clips-{os.geteuid()}" / "by-sha256"


def refusal(config: StageConfig) -> str:
    """The one line that a user sees; what is left is no home, and nothing half written."""
    with pytest.raises(InputError) as error:
        stage(config)
    assert "\n" not in str(error.value)
    assert not list(config.folder.rglob(MANIFEST)) and not list(config.folder.rglob(".*"))
    return str(error.value)


def edit_manifest(shards: Path, change: Callable[[dict[str, Any]], object]) -> None:
    packed = json.loads((shards / MANIFEST).read_text())
    change(packed)
    (shards / MANIFEST).write_text(json.dumps(packed))


# Manifests and shards of others


def shard_of(packed: dict[str, Any]) -> dict[str, Any]:
    return packed["splits"]["train"]["shards"][1]


@pytest.mark.parametrize("name", ["../../../evil", "/etc/evil", "a/b", ".hidden", "..", "", "a b", "a;b", "a\nb", "$(a)", 7, None, ["a"], "train-000000"])
def test_names_that_must_not_become_paths_are_refused(name: Any, shards: Path, folder: Path) -> None:
    edit_manifest(shards, lambda packed: shard_of(packed).update(name=name))
    fault = "is named twice" if name == "train-000000" else "is no plain file name"
    text = refusal(StageConfig(str(shards), folder))
    assert text == f"{shards / MANIFEST}: shard {name!r} of split train {fault}. Give a manifest that python -m convert wrote."
    assert not folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed["splits"].update({"../../evil": packed["splits"]["train"]}),
        lambda packed: shard_of(packed).update(tar_sha256="../../../evil"),
        lambda packed: shard_of(packed).update(tar_sha256=None),
        lambda packed: shard_of(packed).update(index_sha256="A" * 64),
        lambda packed: shard_of(packed).update(tar_bytes=-1),
        lambda packed: shard_of(packed).update(tar_bytes="40960"),
        lambda packed: packed.update(home=["x"]),
    ],
)
def test_other_fields_that_are_not_what_they_should_be_are_refused(change: Callable[[dict[str, Any]], object], shards: Path, folder: Path) -> None:
    edit_manifest(shards, change)
    assert refusal(StageConfig(str(shards), folder)).startswith(f"{shards / MANIFEST}: ")
    assert not folder.exists()


def test_the_homes_name_cannot_leave_the_folder(shards: Path, folder: Path) -> None:
    edit_manifest(shards, lambda packed: packed["home"].update(folder="../../x y/" + "z" * 300))
    home = stage(StageConfig(str(shards), folder))
    assert home.parent == folder / f"gesture-clips-{os.geteuid()}" and home.name.startswith("_.._x_y_zzz") and len(home.name) < 120


@pytest.mark.parametrize("text", ["", "<html>not found</html>", "[]", '{"format": 99}', '{"format": 1}', "\0"])
def test_a_manifest_that_is_none_is_refused(text: str, shards: Path, folder: Path) -> None:
    (shards / MANIFEST).write_text(text)
    for address in (str(shards), f"file:{shards}"):
        assert refusal(StageConfig(address, folder)).startswith(f"{address}/{MANIFEST}: ")
    assert not folder.exists()


def test_a_folder_of_snippets_is_refused(packed_once: Path, folder: Path) -> None:
    home = next(packed_once.glob("ellen*"))
    assert refusal(StageConfig(str(home), folder)).endswith("These are npz snippets: pack them first, python -m convert pack.")


@pytest.mark.parametrize("spoilt", ["train/train-000001.tar", "val/val-000000.index.mp"])
def test_bytes_that_the_manifest_does_not_promise_are_refused(spoilt: str, shards: Path, folder: Path) -> None:
    blob = (shards / spoilt).read_bytes()
    (shards / spoilt).write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    text = refusal(StageConfig(str(shards), folder))
    assert text == f"{shards / spoilt}: its sha256 is not the manifest's. Run python -m convert verify on its folder."
    (shards / spoilt).write_bytes(blob)
    assert tree(stage(StageConfig(str(shards), folder))) == tree(shards)


def test_a_missing_plan_is_said_and_missed_by_no_training(shards: Path, folder: Path, log: Callable[[], str]) -> None:
    (shards / "val" / "plan.json").unlink()
    home = stage(StageConfig(str(shards), folder))
    assert f"{shards}/val/plan.json: cannot be read" in log() and tree(home) == tree(shards)
    open_source(home, "val").close()


# The disk


def test_a_copy_that_was_changed_without_a_trace_is_found_and_copied_again(shards: Path, folder: Path, log: Callable[[], str]) -> None:
    home = stage(StageConfig(str(shards), folder))
    path = tar_path(home, "train", "train-000001")
    before = {name: stamp for name, stamp in stamps(folder).items() if name.endswith(".tar")}
    blob, times = path.read_bytes(), path.stat()
    path.write_bytes(blob[:-1] + b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stage(StageConfig(str(shards), folder)) == home
    assert tree(home) == tree(shards)
    assert log().count(" is not the bytes that were staged; train shard train-000001 is copied again") == 1
    after = stamps(folder)
    assert len([name for name in before if before[name] != after[name]]) == 2  # the copy and its second name


def test_what_does_not_fit_is_an_error_before_anything_is_copied(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "room_bytes", lambda self, reserve=True: 163_839)
    text = refusal(StageConfig(str(shards), folder))
    needed = "4 shards need 163840 bytes (0.2 MB), free are 163839 (0.2 MB)"
    assert text == f"{folder}: {needed}. Free some space, give another folder, or take fewer --splits."
    assert not list(copies(folder).iterdir())
    monkeypatch.setattr(Store, "room_bytes", lambda self, reserve=True: 163_840)
    stage(StageConfig(str(shards), folder))
    monkeypatch.setattr(Store, "room_bytes", lambda self, reserve=True: 0)
    stage(StageConfig(str(shards), folder))


def test_a_disk_that_becomes_full_in_the_middle_is_said_and_the_next_run_goes_on(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Store.add
    added: list[ShardEntry] = []

    def fill(self: Store, *args: Any) -> None:
        if added:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
        add(self, *args)
        added.append(args[0])

    monkeypatch.setattr(Store, "add", fill)
    text = refusal(StageConfig(str(shards), folder))
    assert text.startswith(f"{folder}: the disk became full (No space left on device); ") and text.endswith("what is staged stays.")
    before = stamps(copies(folder))
    assert len(before) == 1
    monkeypatch.undo()
    assert tree(stage(StageConfig(str(shards), folder))) == tree(shards)
    assert before.items() <= stamps(copies(folder)).items()


def test_an_interrupt_in_the_middle_leaves_nothing_half_written(
    shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Store._write

    def interrupted(self: Store, shard: Any, *rest: Any) -> None:
        write(self, shard, *rest)
        if shard.name == "train-000001":
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "_write", interrupted)
    assert command.run(lambda: bool(stage(StageConfig(str(shards), folder)))) == 130
    assert not list(folder.rglob(".*")) and not list(folder.rglob(MANIFEST)) and len(list(copies(folder).iterdir())) == 1


def test_a_shard_that_another_process_copies_is_waited_for(
    shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[], str]
) -> None:
    claim = put_claim(folder, read_manifest(shards).splits["train"].shards[0])
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.utime(claim, (time.time() - 61,) * 2)

    monkeypatch.setattr(time, "sleep", wait)
    assert tree(stage(StageConfig(str(shards), folder))) == tree(shards)
    assert len(waits) == 3 and log().count("process 4711 on another-node copies this shard") == 1


def test_a_store_of_somebody_else_and_an_impossible_folder_are_refused(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file")
    with pytest.raises(InputError, match=f"^{folder}: expected a folder to stage into; found a file"):
        stage(StageConfig(str(shards), folder))
    folder.unlink()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(InputError, match=f"expected your own folder; found a folder of user {me}"):
        stage(StageConfig(str(shards), folder))


def test_the_command_line_reads_places_and_splits() -> None:
    config = command.parse(StageConfig, "python -m loaders stage", "", ["https://host/shards", "/scratch", "--splits", "train", "val", "--allow-pipe"])
    assert config == StageConfig("https://host/shards", Path("/scratch"), ("train", "val"), True)


def test_small_chunks_give_the_same_bytes(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 1000)
    assert tree(stage(StageConfig(str(shards), folder))) == tree(shards)
