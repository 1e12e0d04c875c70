"""What all tests share: golden files, and an environment in which no SLURM job or torchrun shows through."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convert.pack import PackConfig
from tests import packing as packing_helpers
from tests.making import write_home
from tests.verifying import Check, checker, copy_to_damage, pack_both

GOLDEN = Path(__file__).parent / "golden"
LAUNCHERS = ("SLURM_", "TORCHELASTIC_")
RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew instead of comparing with it")


def pytest_configure(config: pytest.Config) -> None:
    """The tests, and the processes that they start, run the same inside a job as at a desk."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background begins with interrupts ignored, and its children inherit that
    os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: on two busy cores one thread is several times faster than two
    for name in list(os.environ):
        if name.startswith(LAUNCHERS) or name in RANKS:
            del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.golden)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that a test runs in this process shows its log on a stream that ends with the test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = [handler for handler in root.handlers if handler in handlers or not isinstance(handler, logging.StreamHandler)]
    root.setLevel(level)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares the text with tests/golden/NAME, or writes that file with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"tests/golden/{name} is missing. If the new text is right, run make golden and commit the file."
        assert text == path.read_text(encoding="utf-8"), f"tests/golden/{name} differs. If the change is meant, run make golden and commit its diff."

    return compare


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    packing_helpers.use_threads(monkeypatch)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Ten snippets in two splits, every third with a padded tail."""
    return write_home(tmp_path, packing_helpers.COUNTS, padded_every=3)


@pytest.fixture
def packing(home: Path, tmp_path: Path, in_threads: None) -> PackConfig:
    """How to pack them bit-exact into several shards."""
    return PackConfig(home, tmp_path / "out", codec="zstd", shard_mib=packing_helpers.SMALL, workers=2)


@pytest.fixture(scope="session")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_both(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of both codecs and their home, a copy to damage."""
    return copy_to_damage(packed_once, tmp_path / "here", monkeypatch)


@pytest.fixture
def check(packed: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Check:
    return checker(packed, capsys, caplog)
