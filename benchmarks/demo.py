"""The main job on made-up snippets, as a user would type it: synthesize, pack, verify, train, predict, and a table of what came out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from clips.errors import InputError
from clips.manifest import read_manifest

from .loader import LoaderBenchConfig, bench
from .result import table

TRAINING = ["--epochs", "10", "--model-name", "videomae-tiny", "--batch-size", "16", "--lr", "0.016", "--seed", "0"]
ENOUGH_AUROC = 0.9


@dataclass(frozen=True)
class DemoConfig:
    """The whole way on made-up snippets, in a few minutes on two cores."""

    output: Path
    """A folder for everything; an earlier demo in it is removed."""
    clips: int = 220
    """Snippets to make."""


def demo(config: DemoConfig) -> None:
    """Raises InputError when a step fails or the model has not learned."""
    started = time.perf_counter()
    out = config.output
    if out.exists() and any(out.iterdir()) and not (out / "demo").exists():
        raise InputError(f"--output {out}: holds something that is no demo. Name another folder.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "demo").touch()
    _type("-m", "convert", "synthesize", "--output", out / "snippets", "--clips", config.clips)
    home = next(path for path in (out / "snippets").iterdir() if path.is_dir())
    _type("-m", "convert", "pack", "--dataset-home", home, "--output", out / "shards")
    _type("-m", "convert", "verify", out / "shards", "--dataset-home", home)
    _type("train.py", "--dataset-home", out / "shards", "--logger-folder", out / "run", *TRAINING)
    _type("predict.py", out / "run")
    print("\n$ python -m benchmarks loader", flush=True)
    results = {one.name: one.value for one in bench(LoaderBenchConfig(out / "shards", home, quick=True, rivals=False))}
    records = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(record["val/auroc"] for record in records if "val/auroc" in record)
    test = next(record for record in records if "test/auroc" in record)
    before = sum(path.stat().st_size for path in home.rglob("*.npz"))
    after = sum(shard.tar_bytes for split in read_manifest(out / "shards").splits.values() for shard in split.shards)
    npz, shards = results["loader/npz/speed"], results["loader/webdataset/speed"]
    rows = [
        ["size of the clips", f"{before / 1e6:.0f} MB as npz", f"{after / 1e6:.0f} MB in shards"],
        ["loading, 16 x 224 px", f"{npz:.0f} clips/s from npz", f"{shards:.0f} clips/s from shards"],
        ["AUROC of videomae-tiny", f"{best:.3f} on val", f"{test['test/auroc']:.3f} on test"],
    ]
    print("\n" + table(["made-up clips", "", ""], rows))
    print(f"{time.perf_counter() - started:.0f} s; everything lies in {out}")
    if best < ENOUGH_AUROC:
        raise InputError(f"val AUROC {best:.3f}; expected at least {ENOUGH_AUROC}: the model has not learned. Look at {out / 'run' / 'metrics.jsonl'}.")


def _type(*words: object) -> None:
    """Runs a command as a user would, and shows it."""
    print(f"\n$ python {' '.join(map(str, words))}", flush=True)
    code = subprocess.run([sys.executable, *map(str, words)], check=False).returncode
    if code:
        raise InputError(f"this step of the demo failed with exit code {code}; its error stands above.")
