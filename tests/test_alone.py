"""One training at a time in a run's folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

import training.alone
from clips.claim import HeldError, claimed
from training.alone import FILE, alone
from training.distributed import Group

ALONE = Group(0, 1, 0, torch.device("cpu"), "single")


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """By a process that lives until its input ends."""
    code = "import sys; from pathlib import Path; from clips.claim import claimed\n"
    code += "with claimed(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    words, root = [sys.executable, "-c", code, str(folder / FILE)], Path(training.alone.__file__).parents[1]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.communicate()


def test_the_claim_is_there_inside_and_gone_after(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with alone(folder, ALONE):
        assert (folder / FILE).exists()
    assert not folder.exists()
    with alone(folder, ALONE):
        (folder / "config.json").touch()
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_second_training_is_refused_and_told_who_trains(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as other, pytest.raises(HeldError, match=f"process {other.pid} on .* trains this run"), alone(tmp_path, ALONE, patience_s=0):
        raise AssertionError("two trainings in one folder")


def test_it_waits_for_one_that_is_about_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_elsewhere(tmp_path) as other:
        assert other.stdin
        monkeypatch.setattr(training.alone.time, "sleep", lambda _: other.communicate())  # type: ignore[attr-defined]  # the module's own time
        with alone(tmp_path, ALONE, patience_s=30):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_killed_trainings_claim_is_taken_over_at_once(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as other:
        other.kill()
        other.wait()
        assert (tmp_path / FILE).exists()
        start_s = time.monotonic()
        with alone(tmp_path, ALONE, patience_s=0):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
        assert time.monotonic() - start_s < 30


def test_other_ranks_hold_nothing_and_hear_of_a_refusal(tmp_path: Path) -> None:
    class Second(Group):
        def broadcast_object(self, obj: object) -> object:
            return HeldError("rank 0 was refused")

    with pytest.raises(HeldError, match="rank 0 was refused"), alone(tmp_path, Second(1, 2, 0, torch.device("cpu"), "single")):
        pass
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / FILE):
        pass


def test_a_folder_that_the_one_before_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other never began, and took the empty folder with it between our making it and our claim."""
    tries: list[Path] = []

    def claim(path: Path, does: str) -> AbstractContextManager[None]:
        tries.append(path)
        if len(tries) == 1:
            path.parent.rmdir()
        return claimed(path, does)

    monkeypatch.setattr(training.alone, "claimed", claim)
    with alone(tmp_path / "run", ALONE):
        assert (tmp_path / "run" / FILE).exists() and len(tries) == 2
