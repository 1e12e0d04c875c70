"""python -m loaders stage: a folder or an address becomes a home on this disk, whole or not at all."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clips.errors import InputError
from clips.manifest import MANIFEST, read_manifest, tar_path
from convert.verify import VerifyConfig, verify
from loaders import store
from loaders.origin import find_origin
from loaders.source import open_source, splits_of
from loaders.stage import StageConfig, stage
from tests.packing import stamps, tree
from tests.staging import SOON_S, Reader, staged

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


@pytest.fixture
def served(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The shards' address on this machine, and the paths that were asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form: str, *values: Any) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


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


def test_a_staged_home_holds_the_same_bytes_and_is_read_the_same(shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = stage(StageConfig(str(shards), folder))
    assert capsys.readouterr().out == f"{home}\n"
    assert tree(home) == tree(shards)
    digest = hashlib.sha256((shards / MANIFEST).read_bytes()).hexdigest()
    assert home.name == f"ellen_show_length_1300_sample_rate_1_iou_0.55-{digest[:12]}" and home.is_absolute()
    for path in home.rglob("*.tar"):
        assert path.samefile(copies(folder) / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.tar") and not path.is_symlink()
    assert len(list(copies(folder).iterdir())) == 4
    assert splits_of(home) == ["train", "val"]
    for split in ("train", "val"):
        one, other = open_source(shards, split), open_source(home, split)
        assert one.facts == other.facts
        one.close()
        other.close()
    assert verify(VerifyConfig(home, workers=1)) == 0


def test_training_with_the_folder_finds_all_that_was_staged(shards: Path, folder: Path) -> None:
    stage(StageConfig(str(shards), folder))
    reader = Reader(shards, list(read_manifest(shards).splits["train"].shards), folder)
    reader.stager.start()
    assert set(reader.told) == {"train-000000", "train-000001", "train-000002"}
    reader.stager.close()


def test_a_second_run_writes_nothing_and_says_so(shards: Path, folder: Path, log: Callable[[], str]) -> None:
    home = stage(StageConfig(str(shards), folder))
    assert "0 of 4 shards were here already, 4 (0.2 MB) were copied" in log()
    before = stamps(folder)
    assert stage(StageConfig(str(shards), folder)) == home
    assert stamps(folder) == before
    assert "4 of 4 shards were here already, 0 (0.0 MB) were copied" in log()


def test_what_training_staged_is_not_copied_again(shards: Path, folder: Path, log: Callable[[], str]) -> None:
    staged(shards, list(read_manifest(shards).splits["train"].shards), folder)
    before = stamps(copies(folder))
    home = stage(StageConfig(str(shards), folder))
    assert before.items() <= stamps(copies(folder)).items() and tree(home) == tree(shards)
    assert "3 of 4 shards were here already, 1 (0.0 MB) were copied" in log()


def test_a_part_of_the_splits_is_a_home_of_its_own(shards: Path, folder: Path) -> None:
    part = stage(StageConfig(str(shards), folder, splits=("val",)))
    assert splits_of(part) == ["val"] and part.name.endswith("-val") and not (part / "train").exists()
    assert read_manifest(part).splits == {"val": read_manifest(shards).splits["val"]}
    open_source(part, "val").close()
    whole = stage(StageConfig(str(shards), folder))
    assert whole != part and tree(whole) == tree(shards)
    assert tar_path(whole, "val", "val-000000").samefile(tar_path(part, "val", "val-000000"))
    both = stage(StageConfig(str(shards), folder, splits=("val", "train")))
    assert both.name == f"{whole.name}-train-val"


def test_an_unknown_split_is_named(shards: Path, folder: Path) -> None:
    assert refusal(StageConfig(str(shards), folder, splits=("trian",))) == "--splits trian: unknown; expected one of train, val. Did you mean train?"
    assert not folder.exists()


def test_links_stand_in_where_files_have_but_one_name(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    home = stage(StageConfig(str(shards), folder))
    assert all(path.is_symlink() and not os.readlink(path).startswith("/") for path in home.rglob("*.tar"))
    assert tree(home) == tree(shards)
    moved = folder.rename(folder.with_name("moved"))
    assert tree(moved / home.relative_to(folder)) == tree(shards)


# Addresses


@needs_curl
def test_an_address_becomes_a_home_and_a_second_run_asks_for_the_manifest_alone(
    served: tuple[str, list[str]], shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, asked = served
    home = stage(StageConfig(address, folder))
    assert tree(home) == tree(shards) and capsys.readouterr().out == f"{home}\n"
    assert sorted(asked) == sorted(f"/{path}" for path in tree(shards))
    open_source(home, "train").close()
    asked.clear()
    assert stage(StageConfig(f"{address}/{MANIFEST}", folder)) == home
    assert asked == [f"/{MANIFEST}"]
    assert stage(StageConfig(str(shards), folder)) == home  # the same content


@needs_curl
@pytest.mark.parametrize("lost", ["manifest.json", "train/train-000001.index.mp", "train/train-000001.tar"])
def test_a_file_that_the_server_lacks_is_named_and_the_next_run_goes_on(lost: str, served: tuple[str, list[str]], shards: Path, folder: Path) -> None:
    address, asked = served
    (shards / lost).rename(shards / "away")
    reason = "cannot be read (the server refuses it or has no such file). Look whether it is there and may be read."
    assert refusal(StageConfig(address, folder)) == f"{address}/{lost}: {reason}"
    (shards / "away").rename(shards / lost)
    asked.clear()
    assert tree(stage(StageConfig(address, folder))) == tree(shards)
    assert ("/train/train-000000.tar" in asked) == (not lost.endswith(".tar"))  # what was staged before stays


@needs_curl
def test_a_server_that_is_not_there_is_said(served: tuple[str, list[str]], folder: Path) -> None:
    text = refusal(StageConfig("http://127.0.0.1:1/shards/", folder))
    assert text == "http://127.0.0.1:1/shards/manifest.json: cannot be read (no connection). Look whether it is there and may be read."


@pytest.mark.parametrize("form", ["file:{}", "file://{}", "pipe:cat {}", "pipe:cat {}/{{path}} | cat"])
def test_other_addresses_of_webdataset_are_read(form: str, shards: Path, folder: Path) -> None:
    assert tree(stage(StageConfig(form.format(shards), folder, allow_pipe=form.startswith("pipe")))) == tree(shards)


@pytest.mark.parametrize("address", ["pipe:touch {}", "PIPE:touch {}", "Pipe:touch {} #{{path}}"])
def test_a_shell_command_runs_only_when_allowed(address: str, folder: Path, tmp_path: Path) -> None:
    address = address.format(tmp_path / "ran")
    assert refusal(StageConfig(address, folder)) == f"{address}: would run a shell command for each file. Add --allow-pipe if that is meant."
    assert not (tmp_path / "ran").exists()


def test_a_command_that_fails_or_never_ends_its_output_is_said(shards: Path, folder: Path) -> None:
    text = refusal(StageConfig("pipe:exit 3; true {path}", folder, allow_pipe=True))
    assert text == "pipe:exit 3; true manifest.json: cannot be read (its command ended with exit code 3). Look whether it is there and may be read."
    endless = f"pipe:cat {shards}/{{path}}; case {{path}} in *.tar) yes;; esac"
    assert "more than 40960 bytes; the manifest promises 40960." in refusal(StageConfig(endless, folder, allow_pipe=True))


def test_a_command_that_hangs_after_wrong_bytes_is_ended(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 1000)
    hangs = f"pipe:cat {shards}/{{path}}; case {{path}} in *.tar) head -c 2000 /dev/zero; exec sleep 60;; esac"
    thread = threading.Thread(target=refusal, args=(StageConfig(hangs, folder, allow_pipe=True),), daemon=True)
    thread.start()
    thread.join(SOON_S)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("address", "reason"),
    [("/nowhere", "no such folder; expected shards that python -m convert pack wrote, or their address."), ("gopher://x", "no gopen handler defined")],
)
def test_what_is_no_folder_and_no_address_is_refused(address: str, reason: str, folder: Path) -> None:
    assert reason in refusal(StageConfig(address, folder))


def test_a_folder_with_braces_and_a_long_command_are_taken_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "{path}").mkdir()
    assert find_origin(f"{tmp_path}/{{path}}/", False).where("a/b") == f"{tmp_path}/{{path}}/a/b"
    assert find_origin("pipe:" + "x" * 5000, True).is_remote
