"""The loader's benchmark measures what it says, on a few clips; never how long it took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.loader import LoaderBenchConfig, bench
from clips.errors import InputError
from convert.pack import PackConfig, pack
from tests.making import write_home
from tests.packing import use_threads


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    use_threads(monkeypatch)
    home = write_home(tmp_path / "npz", {"train": {"gesture": 6, "nongesture": 5}}, frames=5, height=40, width=40)
    pack(PackConfig(home, tmp_path / "shards"))
    return tmp_path / "shards", home


def test_floor_shards_and_npz_are_measured_in_one_run(homes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, home = homes
    threads = torch.get_num_threads()
    results = {one.name: one for one in bench(LoaderBenchConfig(shards, home, frames=4, size=24, rounds=3, json=tmp_path / "results.jsonl"))}
    kinds = {"cpu": "CPU ms/clip", "speed": "clips/s", "over_floor": "ratio"}
    assert {name: one.unit for name, one in results.items()} == {
        f"loader/{name}/{kind}": unit for name in ("floor", "webdataset", "npz") for kind, unit in kinds.items()
    }
    for one in results.values():
        assert one.n == 3 and 0 < one.spread[0] <= one.value <= one.spread[1]
        assert one.config["clips"] == 8  # the full batches of eleven clips
    assert results["loader/floor/over_floor"].spread == (1, 1)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 9
    assert "over floor" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_shards_in_the_place_of_npz_are_refused(homes: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="expected npz snippets"):
        bench(LoaderBenchConfig(homes[0], homes[0]))
