"""Memory over many epochs: flat, buffers used again, and nothing that somebody keeps written over."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clips.clip import ClipSpec
from convert.pack import PackConfig, pack
from loaders import stream
from loaders.batch import Batch
from loaders.decode import FreeList
from loaders.stream import DecodeIn
from tests.loading import decoding_processes, keys_in, opened
from tests.making import write_home
from tests.packing import use_threads

SPEC = ClipSpec(9, 96, 128)
FRAME_BYTES = 96 * 128 * 3
CLIP_BYTES = 9 * FRAME_BYTES
WARM_UP, EPOCHS = 6, 20


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve clips, their frames larger than what an interpreter takes and gives back by the way."""
    folder = tmp_path_factory.mktemp("memory")
    home = write_home(folder, {"train": {"a": 6, "b": 6}}, SPEC.frames, SPEC.height, SPEC.width)
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        pack(PackConfig(home, folder / "shards", "zstd", workers=1, shard_mib=1))
    return {"webdataset": folder / "shards", "npz": home}


@pytest.fixture
def traced() -> Iterator[None]:
    """Python's memory is counted; a collection looks at what the test itself made, not at all of torch (.2 s each time)."""
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.unfreeze()


@pytest.mark.parametrize(("loader", "decode_in"), [("webdataset", "threads"), ("npz", "threads"), ("webdataset", "process")])
def test_memory_stays_flat_over_twenty_epochs(homes: dict[str, Path], traced: None, loader: str, decode_in: DecodeIn) -> None:
    """What Python holds by less than a frame an epoch, what the system counts, here and beside, by less than a clip."""
    held = []
    with opened(homes[loader], loader, spec=SPEC, decode_in=decode_in) as made:
        processes = [os.getpid(), *decoding_processes()]
        assert len(processes) == (2 if decode_in == "process" else 1)
        for epoch in range(WARM_UP + EPOCHS):
            keys_in(made.training(epoch))
            next(made.training(epoch))  # and left half-way
            gc.collect()
            held.append([tracemalloc.get_traced_memory()[0], *map(anonymous_bytes, processes)])
    python, *system = np.polyfit(np.arange(EPOCHS), np.array(held[WARM_UP:], float), 1)[0]
    assert python < FRAME_BYTES
    assert max(system) < CLIP_BYTES


def anonymous_bytes(process: int) -> int:
    """Of a process: its memory that neither stands for a file nor is shared."""
    lines = dict(line.split(":") for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])


@pytest.fixture
def made_buffers(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every batch buffer that is made."""
    buffers: list[np.ndarray] = []

    def noting(make: Callable[[], np.ndarray]) -> FreeList:
        def noted() -> np.ndarray:
            buffers.append(make())
            return buffers[-1]

        return FreeList(noted)

    monkeypatch.setattr(stream, "FreeList", noting)
    return buffers


def test_batches_that_nobody_keeps_give_their_buffers_to_later_ones(homes: dict[str, Path], made_buffers: list[np.ndarray]) -> None:
    """Two ahead, one with the training, one that the next is decoded into before the training lets go."""
    with opened(homes["webdataset"], spec=SPEC) as made:
        for epoch in range(4):
            keys_in(made.training(epoch))
            next(made.training(epoch))
        assert 3 <= len(made_buffers) <= 5
        before = len(made_buffers)
        kept = list(made.training(0))
        assert len(made_buffers) > before
        del kept
        before = len(made_buffers)
        for epoch in range(4):
            keys_in(made.training(epoch))
        assert len(made_buffers) == before


@pytest.mark.parametrize("part", ["batch", "view of a batch", "array of a view"])
def test_what_somebody_keeps_of_a_batch_is_never_written_over(homes: dict[str, Path], made_buffers: list[np.ndarray], part: str) -> None:
    take: dict[str, Callable[[Batch], torch.Tensor | np.ndarray]] = {
        "batch": lambda batch: batch.video,
        "view of a batch": lambda batch: batch.video[1:2, 3:],
        "array of a view": lambda batch: batch.video[1, :, ::2].numpy(),
    }
    with opened(homes["webdataset"], spec=SPEC) as made:
        kept, copies = [], []
        for number, batch in enumerate(made.training(0)):
            assert any(np.shares_memory(batch.video.numpy(), buffer) for buffer in made_buffers)
            if number % 2:
                kept.append(take[part](batch))
                copies.append(np.asarray(kept[-1]).copy())
        del batch
        for epoch in range(1, 4):
            keys_in(made.training(epoch))
        assert len(made_buffers) <= len(kept) + 5
    for one, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(np.asarray(one), copy)
