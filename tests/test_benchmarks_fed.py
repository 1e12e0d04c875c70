"""The benchmark of training fed by loaders takes every loader's own batches, and judges by the cached batch's step."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fed import FedConfig, Row, bench_fed, verdict
from benchmarks.loader import LoaderBenchConfig, bench
from benchmarks.result import read_results
from benchmarks.step_sides import Ours
from clips.errors import InputError
from convert.pack import PackConfig, pack
from loaders.batch import Batch
from loaders.stream import Loader
from tests.making import write_home
from tests.packing import use_threads

has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
# webdataset leaves its generators to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fed")
    home = write_home(folder / "npz", {"train": {"gesture": 3, "nongesture": 2}}, frames=18, height=72, width=72)
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        pack(PackConfig(home, folder / "shards"))
    return folder / "shards"


def test_every_loader_feeds_the_step_with_its_own_clips(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step, keys, training, epochs = Ours.step, set[str](), Loader.training, list[int]()

    def watched(self: Ours, forward: Any, batch: Batch) -> None:
        keys.update(batch.key)
        step(self, forward, batch)

    def begun(self: Loader, epoch: int, consumed: int = 0) -> Iterator[Batch]:
        epochs.append(epoch)
        return training(self, epoch, consumed)

    monkeypatch.setattr(Ours, "step", watched)
    monkeypatch.setattr(Loader, "training", begun)
    path = tmp_path / "results.jsonl"
    results = {one.name: one for one in bench_fed(FedConfig(shards, quick=True, rounds=1, seconds=0.01, threads=(1,), json=path))}
    there = ["webdataset", *(["dali"] if has_dali else [])]
    kinds = {"speed", "cpu", "of_cached", "wait"}
    assert set(results) == {"fed/videomae-tiny/cached/speed", "fed/videomae-tiny/cached/cpu"} | {
        f"fed/videomae-tiny/{loader}/1_threads/{kind}" for loader in there for kind in kinds
    }
    assert read_results(path).keys() == results.keys()
    cached, fed = results["fed/videomae-tiny/cached/speed"].value, results["fed/videomae-tiny/webdataset/1_threads/speed"].value
    assert results["fed/videomae-tiny/webdataset/1_threads/of_cached"].value == pytest.approx(100 * fed / cached)
    assert {key.split("/")[0] for key in keys} == {"cached", "train"} and len(keys) > 3
    assert epochs == [0] * len(there)  # no epoch ends while something is measured
    said = capsys.readouterr().out
    assert "a CPU's numbers say nothing" in said and (has_dali or "dali: not measured, NVIDIA DALI is not installed" in said)


def fed(loader: str, threads: int, *of_cached: float) -> Row:
    return Row(loader, threads, [1.0], list(of_cached))


def test_the_aims_are_a_gpus_and_depend_on_the_threads() -> None:
    rows = [Row("cached", 0, [1.0]), fed("webdataset", 1, 50.0), fed("webdataset", 2, 91.0), fed("dali", 4, 96.0, 98.0, 97.5), fed("dali", 16, 96.0)]
    said = verdict(rows, "NVIDIA H200")
    assert said.endswith("webdataset with 2 threads 9.0 % (reached), dali with 4 threads 2.5 % (reached), dali with 16 threads 4.0 % (missed).")
    assert "with 1 threads" not in said
    assert verdict(rows[:1], "NVIDIA H200").endswith("not measured.")
    assert "reached" not in verdict(rows, None)


@pytest.mark.parametrize("flags", [{"threads": (0,)}, {"threads": ()}, {"rounds": 0}, {"seconds": 0.0}, {"micro_batch": 0}, {"hw_decoder_load": 2.0}])
def test_flags_that_cannot_be_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        FedConfig(**flags)


@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_the_loaders_benchmark_measures_dali_when_asked(shards: Path) -> None:
    results = {one.name for one in bench(LoaderBenchConfig(shards, frames=4, size=24, threads=1, quick=True, rivals=False, dali=True))}
    assert {"loader/dali/cpu", "loader/dali/over_floor", "loader/dali/first_batch"} <= results
