"""Loaders over time: iterators left half-way, epochs side by side, threads, files, memory, processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders.plan import Plan
from loaders.source import ChooseFrames, ClipSource, Loaded, open_source
from loaders.stream import Loader
from tests.loading import CROP, CROP_ALONE, MANY_SHARDS_MIB, SEED, assert_same, by_key, digests_of_rank, keys_in, npz_home, opened, shards


@pytest.fixture
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.getbasetemp(), "zstd", MANY_SHARDS_MIB)


@pytest.fixture
def snippets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npz_home(tmp_path_factory.getbasetemp())


class Busy:
    """A source whose loads take a while, scribbling over their buffer meanwhile, and which knows how many are under way."""

    def __init__(self, source: ClipSource) -> None:
        self._source, self._lock = source, threading.Lock()
        self.facts, self.class_names, self.stored, self.source = source.facts, source.class_names, source.stored, source.source
        self.under_way = 0

    def load(self, number: int, choose: ChooseFrames, out: np.ndarray, with_points: bool) -> Loaded:
        with self._lock:
            self.under_way += 1
        for scribble in range(3000):
            out.fill(scribble % 256)
        loaded = self._source.load(number, choose, out, with_points)
        with self._lock:
            self.under_way -= 1
        return loaded

    def describe(self) -> list[str]:
        return self._source.describe()

    def close(self) -> None:
        self._source.close()


def test_an_epoch_left_half_way_ends_its_loads_and_spoils_no_later_epoch(packed: Path) -> None:
    with opened(packed) as made:
        whole = by_key(made.training(1))
    busy = Busy(open_source(packed, "train"))
    loader = Loader(busy, Plan(21, 4, 2, SEED), CROP, torch.device("cpu"), 2, 2, None, CROP_ALONE, True)
    for place in range(8):
        for number, _ in enumerate(loader.training(0)):
            if number == place:
                break
        assert busy.under_way == 0
        if place % 4 == 0:
            assert_same(by_key(loader.training(1)), whole)
    loader.close()


def test_two_epochs_read_side_by_side_do_not_mix(packed: Path) -> None:
    with opened(packed) as made:
        alone = [by_key(made.training(epoch)) for epoch in (0, 1)]
        pairs = list(zip(made.training(0), made.training(1), strict=True))
    for epoch, batches in enumerate(zip(*pairs, strict=True)):
        assert_same(by_key(batches), alone[epoch])


def test_an_iterator_may_outlive_its_loader(packed: Path) -> None:
    with opened(packed) as made:
        batches = made.training(0)
        next(batches)
    del batches
    assert decoding_threads() == []


def test_threads_and_files_are_gone_after_close(packed: Path) -> None:
    with opened(packed, threads=3) as made:
        next(made.training(0))
        assert 1 <= len(decoding_threads()) <= 3
        assert open_below(packed)
    assert decoding_threads() == [] and open_below(packed) == []


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def open_below(folder: Path) -> list[Path]:
    """The files below `folder` that this process holds open."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("without /proc nobody tells which files are open")
    links = [Path(os.readlink(link)) for link in descriptors.iterdir() if link.is_symlink()]
    return [path for path in links if folder in path.parents]


@pytest.mark.parametrize("kind", ["packed", "snippets"])
def test_memory_stays_flat_over_ten_epochs(kind: str, request: pytest.FixtureRequest) -> None:
    with opened(request.getfixturevalue(kind)) as made:
        for epoch in range(2):
            keys_in(made.training(epoch))
        gc.collect()
        tensors = tensor_bytes()
        tracemalloc.start()
        try:
            keys_in(made.training(2))
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            for epoch in range(3, 13):
                keys_in(made.training(epoch))
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert tensor_bytes() <= tensors
        assert grown < 20_000  # a clip's stored frames are 20 kB


def tensor_bytes() -> int:
    """Of all tensors that Python knows of."""
    return sum(one.untyped_storage().nbytes() for one in gc.get_objects() if type(one) is torch.Tensor)


def test_two_processes_together_read_the_clips_of_one(packed: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other_process:
        future = other_process.submit(digests_of_rank, packed, 1, 2)
        alone, first = digests_of_rank(packed, 0, 1), digests_of_rank(packed, 0, 2)
        second = future.result()
    assert len(first) == len(second) == 10
    assert first | second == alone
