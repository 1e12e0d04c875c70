"""What DALI does on a GPU, against its CPU operators and against ourselves; left out unless asked for: pytest -m gpu."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

import train
from clips.clip import ClipSpec
from convert.pack import PackConfig, pack
from loaders import dali_graph
from loaders.dali_install import jpeg_engines
from loaders.plan import Plan
from loaders.sample import AugmentConfig
from loaders.source import open_source
from loaders.stream import Loader
from tests.loading import assert_same_beside_pixels
from tests.making import write_home
from tests.packing import use_threads
from tests.test_dali_bad import rewrite, without_tables
from training.distributed import Group
from training.run_folder import RunFolder

pytestmark = pytest.mark.gpu
COUNTS = {"train": {"nongesture": 9, "gesture": 8}, "val": {"nongesture": 3, "gesture": 3}}
SPEC = ClipSpec(8, 64, 64)
AUGMENT = AugmentConfig(colour=0.4, strength=5.0, erasing=0.5)
SHARES = pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
MEAN, LARGEST = 1.0, 24  # of 255, for a frame's mean and any pixel: another inverse DCT, and what a recoloured pixel makes of its error


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seventeen clips of 72x72 to train on, as JPEG and bit-exact."""
    pytest.importorskip("nvidia.dali")
    folder = tmp_path_factory.mktemp("homes")
    home = write_home(folder, COUNTS, frames=17, height=72, width=72)
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        for codec in ("jpeg", "zstd"):
            pack(PackConfig(home, folder / codec, codec, workers=1))
    return {codec: folder / codec for codec in ("jpeg", "zstd")}


def loader_of(home: Path, loader: str, device: str, hw_decoder_load: float = 0.65, micro_batch: int = 4, augment: AugmentConfig = AUGMENT) -> Loader:
    source = open_source(home, "train", loader)
    plan = Plan(len(source.facts), micro_batch, micro_batch, seed=1)
    return Loader(source, plan, SPEC, torch.device(device), 2, augment=augment, with_points=True, max_bad_clips=17, hw_decoder_load=hw_decoder_load)


@SHARES
@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_clips_from_the_gpu_are_near_those_of_the_cpu_and_all_else_is_the_same(homes: dict[str, Path], codec: str, hw_decoder_load: float) -> None:
    """Whole epochs held beside a busy GPU."""
    on_gpu, on_cpu = loader_of(homes[codec], "dali", "cuda", hw_decoder_load), loader_of(homes[codec], "webdataset", "cpu")
    busy = torch.randn(4096, 4096, device="cuda")
    for epoch in range(3):
        held = list(on_gpu.training(epoch))
        busy = busy @ busy / 4096
        for ours, theirs in zip(held, on_cpu.training(epoch), strict=True):
            assert ours.video.is_cuda and ours.video.is_contiguous() and ours.key == theirs.key
            difference = (ours.video.cpu().int() - theirs.video.int()).abs()
            assert difference.float().mean((2, 3, 4)).max() <= MEAN
            assert difference.max() <= LARGEST
            assert_same_beside_pixels(ours, theirs)
    on_gpu.close()
    on_cpu.close()


@SHARES
def test_no_neighbour_is_spoilt_in_two_hundred_rounds_beside_a_busy_stream(homes: dict[str, Path], hw_decoder_load: float) -> None:
    """The same batches every time: what another decode wrote over, or what was decoded over memory still in use, would differ."""
    loader = loader_of(homes["jpeg"], "dali", "cuda", hw_decoder_load)
    right = [batch.video.clone() for batch in loader.training(0)]
    torch.cuda.synchronize()
    busy, side, wrong = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream(), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        with torch.cuda.stream(side):
            busy = busy @ busy / 2048
        for batch, expected in zip(loader.training(0), right, strict=True):
            wrong += (batch.video != expected).sum()  # on the GPU, some time later: by then the batch is let go
    assert wrong.item() == 0
    loader.close()


def test_memory_that_the_gpu_still_reads_is_not_decoded_into(homes: dict[str, Path]) -> None:
    """Each batch is let go while a copy of it waits behind a long queue of work."""
    loader = loader_of(homes["jpeg"], "dali", "cuda", 1.0)
    right = [batch.video.clone() for batch in loader.training(0)]
    torch.cuda.synchronize()
    busy = torch.randn(8192, 8192, device="cuda")
    copies = []
    for batch in loader.training(0):
        for _ in range(4):
            busy = busy @ busy / 8192
        copies.append(batch.video.clone())
        del batch
    assert all(torch.equal(copy, expected) for copy, expected in zip(copies, right, strict=True))
    loader.close()


def test_the_memory_of_the_gpu_stays_flat(homes: dict[str, Path]) -> None:
    """Torch's and DALI's together, as the driver counts it."""
    loader, free = loader_of(homes["jpeg"], "dali", "cuda"), []
    for epoch in range(30):
        for _ in loader.training(epoch):
            pass
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[9] - free[-1] <= 32 << 20
    loader.close()


def test_clips_lie_where_dali_wrote_them(homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    places = []

    def noted(tensor: object) -> torch.Tensor:
        places.append(tensor.data_ptr())  # type: ignore[attr-defined]  # DALI's tensor has it
        return from_dlpack(tensor)

    monkeypatch.setattr(dali_graph, "from_dlpack", noted)
    loader = loader_of(homes["jpeg"], "dali", "cuda")
    assert [batch.video.data_ptr() for batch in loader.training(0)] == places
    loader.close()


@SHARES
def test_a_frame_that_dali_refuses_is_counted_and_shifts_no_other_clip(homes: dict[str, Path], tmp_path: Path, hw_decoder_load: float) -> None:
    home = Path(shutil.copytree(homes["jpeg"], tmp_path / "home"))
    whole = loader_of(home, "dali", "cuda", hw_decoder_load)
    batches = list(whole.training(0))
    bad = batches[1].key[2]
    rewrite(home, lambda key, frame, blob: without_tables(blob) if key == bad else blob)
    damaged = loader_of(home, "dali", "cuda", hw_decoder_load)
    for ours, theirs in zip(damaged.training(0), batches, strict=True):
        assert ours.key == theirs.key and [one.key for one in ours.bad] == [key for key in ours.key if key == bad]
        for place, key in enumerate(ours.key):
            assert torch.equal(ours.video[place], theirs.video[place] * (key != bad))
    whole.close()
    damaged.close()


def test_nvjpeg_tells_whether_there_is_an_engine() -> None:
    pytest.importorskip("nvidia.dali")
    found = jpeg_engines()
    assert found is not None and found[0] >= 0
    if any(name in torch.cuda.get_device_name() for name in ("A100", "H100", "H200", "A30", "B200")):
        assert found[0] > 0


def test_a_run_trains_from_dali_and_its_losses_are_near_those_of_webdataset(homes: dict[str, Path], tmp_path: Path) -> None:
    losses = {}
    for loader in ("webdataset", "dali"):
        folder = tmp_path / loader
        words = ["--dataset-home", str(homes["jpeg"]), "--logger-folder", str(folder), "--epochs", "2", "--model-name", "videomae-tiny", "--batch-size", "8"]
        config = train.parse([*words, "--loader", loader, "--device", "cuda", "--log-every", "1", "--precision", "fp32"])
        train.train(config, Group(0, 1, 0, torch.device("cuda", 0), "single"), RunFolder(folder))
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses[loader] = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses["dali"]) == 4
    np.testing.assert_allclose(losses["dali"], losses["webdataset"], atol=0.02)
