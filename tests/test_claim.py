"""One run at a time packs a share: who is refused, who takes over, and that nothing is left of a claim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clips import claim, command
from clips.claim import claimed, is_held, started
from clips.errors import InputError
from convert.pack import PackConfig, pack
from tests.making import write_home
from tests.packing import snippets_of, spoil, tree, use_threads

ELSEWHERE = {"host": "another-node", "pid": 4711, "space": "another-boot", "started": "17"}
NAME = ".share-0-of-1-train.claim"


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    use_threads(monkeypatch)
    return PackConfig(write_home(tmp_path, {"train": {"a": 3}}, frames=2, height=16, width=16), tmp_path / "out", shard_mib=0.01, workers=1)


def put_claim(output: Path, holder: Any, silent_s: float = 0.0, name: str = NAME) -> Path:
    """A claim whose last heartbeat was `silent_s` ago."""
    output.mkdir(exist_ok=True)
    path = output / name
    path.write_text(holder if isinstance(holder, str) else json.dumps(holder))
    os.utime(path, (time.time() - silent_s,) * 2)
    return path


def dead_process() -> dict[str, Any]:
    """A holder of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = claim._myself() | {"pid": process.pid, "started": started(process.pid)}
    process.communicate(b"\n")
    return mine


@pytest.mark.parametrize("silent_s", [0, 30, 58])
def test_a_second_run_stops_while_the_first_ones_heartbeat_is_young(silent_s: float, packing: PackConfig) -> None:
    path = put_claim(packing.output, ELSEWHERE, silent_s)
    with pytest.raises(InputError) as error:
        pack(packing)
    text = str(error.value)
    assert text.startswith(f"{path}: process 4711 on another-node packs this share, its heartbeat is ") and "\n" not in text
    assert abs(int(text.split("heartbeat is ")[1].split(" s old")[0]) - silent_s) <= 2
    assert json.loads(path.read_text()) == ELSEWHERE and not list(packing.output.rglob("*.tar"))
    assert [p.name for p in packing.output.rglob(".*")] == [NAME]


@pytest.mark.parametrize("silent_s", [61, 10**6])
def test_a_stale_claim_never_blocks(silent_s: float, packing: PackConfig) -> None:
    put_claim(packing.output, ELSEWHERE, silent_s)
    pack(packing)
    assert not list(packing.output.rglob(".*"))


def test_a_dead_process_of_this_machine_never_blocks(packing: PackConfig) -> None:
    put_claim(packing.output, dead_process())
    pack(packing)
    assert not list(packing.output.rglob(".*"))


def test_a_process_number_that_was_given_again_is_another_process(packing: PackConfig) -> None:
    path = put_claim(packing.output, claim._myself())
    assert is_held(path)
    assert not is_held(put_claim(packing.output, claim._myself() | {"started": "1"}))
    assert is_held(put_claim(packing.output, claim._myself() | {"space": "another container", "pid": 10**7}))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "\0" * 40])
def test_a_claim_that_a_crash_left_unreadable_never_blocks(text: str, packing: PackConfig) -> None:
    put_claim(packing.output, text)
    pack(packing)
    assert not list(packing.output.rglob(".*"))


def test_other_shares_go_on_side_by_side(packing: PackConfig) -> None:
    put_claim(packing.output, ELSEWHERE, name=".share-1-of-2-train.claim")
    pack(replace(packing, task=0, tasks=2))
    with pytest.raises(InputError, match="packs this share"):
        pack(replace(packing, task=1, tasks=2))


@pytest.mark.parametrize("end", ["success", "error", "interrupt"])
def test_the_claim_is_gone_after(end: str, packing: PackConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if end == "error":
        spoil(snippets_of(packing.dataset_home)[0])
    if end == "interrupt":

        def interrupted(*_: Any) -> None:
            assert (packing.output / NAME).exists()
            raise KeyboardInterrupt

        monkeypatch.setattr("convert.pack.pack_shards", interrupted)

    def main() -> None:
        pack(packing)

    assert command.run(main) == {"success": 0, "error": 2, "interrupt": 130}[end]
    assert "Traceback" not in capsys.readouterr().err
    assert not list(packing.output.rglob(".*"))


def test_a_claim_is_made_new_by_heartbeats_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.01)
    path = tmp_path / "claim"
    with claimed(path):
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime < time.time() - 60 and time.monotonic() < end:
            time.sleep(0.005)
        assert is_held(path) and path.stat().st_mtime > time.time() - 60
    assert not path.exists()


def test_a_claim_that_another_took_over_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with claimed(path):
        put_claim(tmp_path, ELSEWHERE, name="claim")
    assert json.loads(path.read_text()) == ELSEWHERE


def test_claims_work_where_files_cannot_be_linked(packing: PackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "link", refuse)
    path = put_claim(packing.output, ELSEWHERE)
    with pytest.raises(InputError, match="packs this share"):
        pack(packing)
    path.unlink()
    pack(packing)
    assert not list(packing.output.rglob(".*"))


def leftover(output: Path, name: str, host: str, pid: int) -> Path:
    path = output / "train" / f".{name}.{host}.{pid}.0123abcd.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    return path


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.index.mp", "plan.json"])
def test_temporary_files_of_dead_processes_are_removed(name: str, packing: PackConfig) -> None:
    mine = claim._myself()
    pack(packing)
    before = tree(packing.output)
    leftover(packing.output, name, str(mine["host"]), dead_process()["pid"])
    pack(packing)
    assert tree(packing.output) == before


def test_a_shards_temporary_file_of_another_node_is_removed_unless_a_run_with_other_shares_is_at_work(packing: PackConfig) -> None:
    path = leftover(packing.output, "train-000000.tar", "another-node", 4711)
    other = put_claim(packing.output, ELSEWHERE, name=".share-0-of-7-train.claim")
    pack(packing)  # it may be writing this very shard now
    assert path.exists() and other.exists()
    os.utime(other, (0, 0))
    pack(packing)
    assert not list(packing.output.rglob(".*"))


def test_a_small_temporary_file_of_another_node_is_removed_after_a_minute(packing: PackConfig) -> None:
    path = leftover(packing.output, "plan.json", "another-node", 4711)
    pack(packing)
    assert path.exists()
    os.utime(path, (time.time() - 61,) * 2)
    pack(packing)
    assert not path.exists()
