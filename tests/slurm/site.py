"""A site with the cluster: the repository's own scripts, sent with what a user would send, and what became of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CLOCK = ("clips_per_s", "step_ms", "data_wait_percent", "longest_wait_ms", "longest_wait")
# Long enough to be met in the middle, and losses that move: plain SGD, because AdamW makes full steps of gradients that are rounding noise.
FLAGS = (
    *("--epochs", "4", "--model-name", "videomae-tiny", "--batch-size", "4", "--micro-batch", "2", "--log-every", "1", "--threads", "1", "--device", "cpu"),
    *("--recipe", "plain", "--optimizer", "sgd", "--lr", "1", "--head-init-scale", "1", "--no-evaluate-test"),
)


class Site:
    """Sends slurm/*.sbatch from the repository's folder with an environment that env.sh activates."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path) -> None:
        self.cluster, self.folder, self.shards = cluster, folder, shards

    def exported(self, **variables: str) -> str:
        """sbatch's option that hands over the environment and more: FAULT is a line of shell that spoils every rank but the first (see conftest.py)."""
        return "--export=" + ",".join(["ALL", f"VENV={self.folder}/venv", *(f"{name}={value}" for name, value in variables.items())])

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def send(self, script: str, options: tuple[str | Path, ...], *flags: str | Path) -> str:
        """The number of a job of slurm/SCRIPT."""
        output = f"--output={self.folder}/%j.out"  # the job's own number, also of an array's element
        return self.cluster.submit(self.exported(), output, *options, f"slurm/{script}", *flags, cwd=ROOT)

    def train(self, name: str, *flags: str, options: tuple[str, ...] = ()) -> str:
        """The number of a job that trains runs/NAME on a CPU."""
        return self.send("train.sbatch", ("--gres=none", "--cpus-per-task=1", *options), *self.flags(name), *flags)

    def flags(self, name: str) -> list[str]:
        return ["--dataset-home", str(self.shards), "--logger-folder", str(self.run(name)), *FLAGS]

    def wait_for_step(self, name: str, step: int) -> None:
        self.cluster.wait(f"step {step} of {name}", lambda: len(steps(self.run(name))) >= step, 120)

    def ends(self, job: str, within_s: float = 120.0) -> str:
        """The state in which the job ended."""
        return self.cluster.wait_for(job, *ENDED, within_s=within_s)

    def said(self, job: str) -> str:
        """What the job, or an array's element such as 12_3, has printed, over all of its starts."""
        path = self.folder / f"{self.cluster.number(job)}.out"
        return path.read_text(errors="replace") if path.exists() else ""


def lines(run: Path) -> list[dict[str, Any]]:
    """A run's metrics but for its speeds; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{name: value for name, value in json.loads(line).items() if not name.endswith(CLOCK)} for line in whole]


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of optimiser steps."""
    return [line for line in lines(run) if "train/loss" in line]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: every loss and metric, the proof of the order, the best weights and the last ones."""
    import torch  # takes seconds: only where runs are compared

    assert lines(one) == lines(other)
    for name in ("certificate.json", "threshold.json", "best/model.safetensors", "done"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = (torch.load(next((run / "checkpoints").glob("*.pt")), weights_only=True)["model"] for run in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
