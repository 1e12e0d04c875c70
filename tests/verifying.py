"""What tests of verify share: shards packed once, copies to damage, and what verify says of them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.pack import PackConfig, pack
from convert.verify import VerifyConfig, verify
from tests.making import write_home
from tests.packing import use_threads

COUNTS = {"train": {"nongesture": 4, "gesture": 2}, "val": {"nongesture": 1, "gesture": 1}}
Check = Callable[..., tuple[int, str, str]]


def pack_both(folder: Path) -> Path:
    """The folder, with a home and its shards as zstd and as jpeg."""
    home = write_home(folder, COUNTS, padded_every=3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_threads(monkeypatch)
        pack(PackConfig(home, folder / "zstd", codec="zstd", shard_mib=0.06, workers=2))
        pack(PackConfig(home, folder / "jpeg", codec="jpeg", shard_mib=0.04, quality=97, workers=2))
    return folder


def copy_to_damage(packed_once: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_threads(monkeypatch)
    shutil.copytree(packed_once, to)
    return to


def checker(packed: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Check:
    """Gives exit code, stdout and log of a verify run on the shards of a codec, with the home or without."""

    def run(codec: str = "zstd", with_home: bool = True) -> tuple[int, str, str]:
        caplog.clear()
        capsys.readouterr()
        with caplog.at_level(logging.INFO):
            code = verify(VerifyConfig(packed / codec, home_of(packed) if with_home else None, workers=2))
        return code, capsys.readouterr().out, caplog.text

    return run


def home_of(packed: Path) -> Path:
    return next(path for path in packed.iterdir() if path.name.startswith("ellen"))


def assert_finds(check: Check, text: str, codec: str = "zstd", with_home: bool = False) -> None:
    code, out, log = check(codec, with_home)
    assert code == 1 and text in log, log
    assert not out.endswith(", 0 problems\n") and len(out.splitlines()) == 1  # no verdict over damaged shards
