"""Both tiny models learn what motion alone tells apart, as a user would type it: synthesize, pack, train; also where one clip in twenty is a gesture.

That no single frame gives the class away is shown in test_synthetic.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
Result = TypeVar("Result")
MODELS = ("videomae-tiny", "timesformer-tiny")
SEEDS = (0, 1, 2)  # of the snippets, and of the order and the crops
ENOUGH_AUROC = 0.95
CLIPS = 600  # 420 of train and 90 of val, half of them gestures
RARE = 11  # gestures beside 210 others: 5 %
LEARNING = ("--sched", "cosine", "--device", "cpu", "--threads", "1")
EVEN = ("--epochs", "5", "--batch-size", "16", "--lr", "0.016")
SELDOM = ("--epochs", "45", "--batch-size", "11", "--lr", "0.023", "--balance")  # epochs of 11 gestures and 11 others, always others of the 210


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By seed snippets of 20 frames at 64 px, without test, which nobody asks here."""
    folder = tmp_path_factory.mktemp("snippets")

    def make(seed: int) -> Path:
        run("-m", "convert", "synthesize", "--output", folder / str(seed), "--clips", CLIPS, "--frames", 20, "--size", 64, "--seed", seed)
        (home,) = (folder / str(seed)).iterdir()
        shutil.rmtree(home / "test")
        return home

    return for_each_seed(make)


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_model_learns_motion(model: str, homes: dict[int, Path], tmp_path: Path) -> None:
    found = val_aurocs(model, homes, tmp_path, *EVEN)
    assert min(found.values()) >= ENOUGH_AUROC, found


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_model_learns_motion_where_gestures_are_rare(model: str, homes: dict[int, Path], tmp_path: Path) -> None:
    rare = {seed: shutil.copytree(home, tmp_path / "rare" / str(seed) / home.name, copy_function=os.link) for seed, home in homes.items()}
    for home in rare.values():
        for snippet in sorted((home / "train" / "gesture").iterdir())[RARE:]:
            snippet.unlink()
        assert len(list((home / "train" / "gesture").iterdir())) / len(list(home.glob("train/*/*.npz"))) <= 0.05
    found = val_aurocs(model, rare, tmp_path, *SELDOM)
    assert min(found.values()) >= ENOUGH_AUROC, found


def val_aurocs(model: str, homes: dict[int, Path], folder: Path, *flags: str) -> dict[int, float]:
    """By seed val's AUROC after the last epoch, which unlike the best one nobody chose by val."""

    def learn(seed: int) -> float:
        shards, logger_folder = folder / "shards" / str(seed), folder / "runs" / str(seed)
        run("-m", "convert", "pack", "--dataset-home", homes[seed], "--output", shards, "--workers", 1)
        named = ("--dataset-home", shards, "--logger-folder", logger_folder, "--model-name", model, "--seed", seed)
        run("train.py", *named, *LEARNING, *flags)
        lines = [json.loads(line) for line in (logger_folder / "metrics.jsonl").read_text().splitlines()]
        return [float(line["val/auroc"]) for line in lines if "val/auroc" in line][-1]

    return for_each_seed(learn)


def for_each_seed(work: Callable[[int], Result]) -> dict[int, Result]:
    """What `work` gives for each seed; all at once, which two cores do in half the time."""
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        return dict(zip(SEEDS, pool.map(work, SEEDS), strict=True))


def run(*words: object) -> None:
    """A command line in a process of its own, with one thread: tensors this small are slower with two."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
