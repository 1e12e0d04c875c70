"""What all tests share: golden files, and an environment in which no SLURM job or torchrun shows through."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
LAUNCHERS = ("SLURM_", "TORCHELASTIC_")
RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew instead of comparing with it")


def pytest_configure(config: pytest.Config) -> None:
    """The tests, and the processes that they start, run the same inside a job as at a desk."""
    os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: on two busy cores one thread is several times faster than two
    for name in list(os.environ):
        if name.startswith(LAUNCHERS) or name in RANKS:
            del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.golden)


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
