"""What only a GPU can show; left out unless asked for: pytest -m gpu."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from clips.clip import ClipSpec
from loaders.plan import Plan
from loaders.requests import Pass
from loaders.source import open_source
from loaders.stream import DecodeIn, Loader
from models import load_trained
from tests.loading import assert_same_beside_pixels
from tests.making import write_home
from training.distributed import Group
from training.evaluation import probabilities
from training.precision import Precision
from training.run_folder import RunFolder

pytestmark = pytest.mark.gpu
COUNTS = {"train": {"nongesture": 9, "gesture": 8}, "val": {"nongesture": 3, "gesture": 3}, "test": {"nongesture": 2, "gesture": 2}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("npz"), COUNTS, frames=17, height=72, width=72)


def loader_of(home: Path, device: str, decode_in: DecodeIn = "auto") -> Loader:
    source = open_source(home, "train")
    plan, spec = Plan(len(source.facts), 4, 4, seed=1), ClipSpec(8, 64, 64)
    return Loader(source, plan, spec, torch.device(device), threads=2, with_points=True, decode_in=decode_in)


@pytest.mark.parametrize("decode_in", ["threads", "process"])
def test_batches_on_a_gpu_are_those_of_the_cpu_also_beside_a_busy_gpu(home: Path, decode_in: DecodeIn) -> None:
    on_gpu, on_cpu = loader_of(home, "cuda", decode_in), loader_of(home, "cpu")
    busy = torch.randn(4096, 4096, device="cuda")
    for epoch in range(3):
        held = list(on_gpu.training(epoch))  # held over the epoch: a buffer that is reused too early would show
        busy = busy @ busy / 4096
        for ours, theirs in zip(held, on_cpu.training(epoch), strict=True):
            assert ours.video.is_cuda and ours.key == theirs.key
            assert (ours.video.cpu().int() - theirs.video.int()).abs().max() <= 1
            assert_same_beside_pixels(ours, theirs)
    on_gpu.close()
    on_cpu.close()


@pytest.mark.parametrize("decode_in", ["threads", "process"])
def test_batches_wait_for_their_upload_in_pinned_memory(home: Path, decode_in: DecodeIn) -> None:
    for _ in range(2):  # the second time the memory of the first has been given back
        loader = loader_of(home, "cuda", decode_in)
        for raw in loader._run(Pass(0)):
            assert torch.from_numpy(raw.video).is_pinned()
            raw.release()
        loader.close()


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["videomae-tiny", "timesformer-tiny"])
def test_a_run_trains_finds_its_micro_batch_and_predicts_as_the_cpu_does(home: Path, tmp_path: Path, name: str, precision: str) -> None:
    words = ["--dataset-home", str(home), "--logger-folder", str(tmp_path / "run"), "--epochs", "2", "--model-name", name, "--batch-size", "8"]
    config = train.parse([*words, "--precision", precision, "--device", "cuda", "--log-every", "1"])
    train.train(config, Group(0, 1, 0, torch.device("cuda", 0), "single"), RunFolder(tmp_path / "run"))
    losses = [record["train/loss"] for record in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "train/loss" in record]
    assert len(losses) == 4 and np.isfinite(losses).all()
    scores = {}
    for device in ("cpu", "cuda"):
        model, _ = load_trained(tmp_path / "run" / "best")
        source = open_source(home, "test")
        loader = Loader(source, Plan(4, 4, 4, seed=0), model.spec, torch.device(device), threads=1)
        group = Group(0, 1, 0, torch.device(device), "single")
        scores[device] = probabilities(model.to(device), loader.evaluation(), 4, Precision("fp32", torch.device(device)), group)
        loader.close()
    assert np.abs(scores["cpu"].probabilities - scores["cuda"].probabilities).max() < 0.02  # tf32 and pixels that differ by 1 of 255
