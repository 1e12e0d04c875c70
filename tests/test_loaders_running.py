"""Loaders over time: iterators left half-way, epochs side by side, threads, files, reads ahead, processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Pipe
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clips.manifest import read_index, read_manifest
from convert.pack import PackConfig, pack
from loaders import decode
from loaders.beside import Mailbox
from loaders.decode import DecodeThreads, Effort
from loaders.plan import Plan
from loaders.requests import Pass, Recipe
from loaders.sample import AugmentConfig
from loaders.shards import GAP_BYTES, runs_of
from loaders.source import open_source
from tests.loading import MANY_SHARDS_MIB, SEED, STORED, assert_same, by_key, digests_of_rank, keys_in, opened, shards
from tests.packing import use_threads
from tests.sources import Busy, Gated


@pytest.fixture
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.getbasetemp(), "zstd", MANY_SHARDS_MIB)


def test_an_epoch_left_half_way_ends_its_loads_and_spoils_no_later_epoch(packed: Path) -> None:
    with opened(packed) as made:
        whole = by_key(made.training(1))
    with opened(packed, around=Busy) as loader:
        busy = loader.source
        assert isinstance(busy, Busy)
        for place in range(8):
            for number, _ in enumerate(loader.training(0)):
                if number == place:
                    break
            assert busy.decoding == 0
            if place % 4 == 0:
                assert_same(by_key(loader.training(1)), whole)
    assert busy.held == 0


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
    assert our_threads() == []


def test_threads_and_files_are_gone_after_close(packed: Path) -> None:
    with opened(packed, threads=3) as made:
        next(made.training(0))
        kinds = [name.split("_")[0] for name in our_threads()]
        assert set(kinds) == {"decode", "read"} and kinds.count("decode") <= 3
        assert open_below(packed)
    assert our_threads() == [] and open_below(packed) == []


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "read"))]


def open_below(folder: Path) -> list[Path]:
    """The files below `folder` that this process holds open."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("without /proc nobody tells which files are open")
    links = [Path(os.readlink(link)) for link in descriptors.iterdir() if link.is_symlink()]
    return [path for path in links if folder in path.parents]


def test_two_processes_together_read_the_clips_of_one(packed: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other_process:
        future = other_process.submit(digests_of_rank, packed, 1, 2)
        alone, first = digests_of_rank(packed, 0, 1), digests_of_rank(packed, 0, 2)
        second = future.result()
    assert len(first) == len(second) == 10
    assert first | second == alone


def test_threads_that_decode_leave_the_training_its_own_number_of_threads(packed: Path) -> None:
    """Of torch, which tells every thread that has not asked before what any thread set last."""
    before, found = torch.get_num_threads(), []

    def train() -> None:
        with opened(packed) as made:
            keys_in(made.training(0))
        found.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        training = threading.Thread(target=train)
        training.start()
        training.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3]


def test_clips_are_asked_for_before_the_first_is_decoded_sorted_by_place(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten batches of two: eight clips at first, then four more each time that four or fewer are left."""
    monkeypatch.setattr(decode, "READERS", 1)  # so that reads begin one after another
    asked: SimpleQueue[int] = SimpleQueue()
    with opened(packed, prefetch=1, look_ahead=8, around=partial(Gated, note=asked.put)) as made:
        gated = made.source
        assert isinstance(gated, Gated)
        found: list[str] = []
        training = threading.Thread(target=lambda: found.extend(keys_in(made.training(0))))
        training.start()
        try:
            before = [asked.get(timeout=60) for _ in range(8)]
        finally:
            gated.gate.set()
            training.join()
        after = [asked.get() for _ in range(12)]
        order = [gated.facts.index(next(fact for fact in gated.facts if fact.key == key)) for key in found]
        groups = [order[:8], order[8:12], order[12:16], order[16:20]]
        assert [*before, *after] == [number for group in groups for number in sorted(group, key=gated.where)]
        assert asked.empty() and before != sorted(before) and before != order[:8]  # keys' order and the plan's are others


@pytest.mark.parametrize(("prefetch", "look_ahead"), [(1, 0), (1, 4), (2, 7), (1, 1000)])
def test_no_more_clips_are_held_than_asked_for_and_none_after_a_pass_left_half_way(packed: Path, prefetch: int, look_ahead: int) -> None:
    with opened(packed, prefetch=prefetch, look_ahead=look_ahead, around=partial(Busy, scribbles=100)) as made:
        busy = made.source
        assert isinstance(busy, Busy)
        for num_batches in (10, 1, 4):
            batches = made.training(0)
            for _ in range(num_batches):
                next(batches)
        del batches
    assert busy.held == 0
    decoding = 2 * (prefetch + 1)
    assert busy.most_held <= (min(2, decoding) if not look_ahead else min(20, decoding + look_ahead + 1))
    assert busy.most_held > min(20, look_ahead) // 2


def test_a_batch_that_waits_for_a_buffer_lets_its_clips_go_with_the_pass(packed: Path) -> None:
    """With fewer buffers than batches could be under way."""
    ours, theirs = Pipe()
    with closing(open_source(packed, "train")) as source, ours, theirs:
        busy = Busy(source, scribbles=1)
        recipe = Recipe(Plan(21, 4, 2, SEED), 5, AugmentConfig(), np.arange(21))
        threads = DecodeThreads(busy, Mailbox(ours, np.empty((2, 2, 5, *STORED.video_shape[1:]), np.uint8)), Effort(2, 3, 4), True)
        batches = threads.run(recipe.batches(busy, Pass(0)))
        next(batches)
        del batches
        threads.close()
    assert busy.held == 0


@given(st.lists(st.tuples(st.integers(0, 2_000_000), st.integers(0, 200_000)), min_size=1, max_size=12))
def test_runs_hold_all_that_is_wanted_and_no_wide_gap(wanted: list[tuple[int, int]]) -> None:
    runs = runs_of(wanted)
    for offset, size in wanted:
        assert sum(begin <= offset and offset + size <= begin + length for begin, length, _ in runs) == 1
    assert [place for _, _, place in runs] == [sum(length for _, length, _ in runs[:number]) for number in range(len(runs))]
    for (begin, length, _), (following, _, _) in pairwise(runs):
        assert following - (begin + length) > GAP_BYTES
    for begin, length, _ in runs:
        inside = sorted((offset, offset + size) for offset, size in wanted if begin <= offset <= begin + length)
        reached = begin
        for low, high in inside:
            assert low - reached <= GAP_BYTES
            reached = max(reached, high)
        assert (inside[0][0], reached) == (begin, begin + length)


def test_small_frames_are_read_in_one_piece_and_of_large_ones_those_chosen(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of 160x160 pixels of noise is larger than a gap may be."""
    use_threads(monkeypatch)
    (tmp_path / "home" / "train" / "a").mkdir(parents=True)
    np.savez(tmp_path / "home" / "train" / "a" / "000000000_x.npz", video=np.random.RandomState(0).randint(0, 256, (9, 160, 160, 3), np.uint8))
    large = tmp_path / "large"
    pack(PackConfig(tmp_path / "home", large, "zstd", workers=1, keypoints="none"))
    (entry,) = read_index(large, "train", read_manifest(large).splits["train"].shards[0]).clips
    begins = entry.frames["offset"].tolist()
    ends = [begin + size for begin, size in zip(begins, entry.frames["size"].tolist(), strict=True)]
    assert min(ends[place] - begins[place] for place in range(9)) > GAP_BYTES
    expected = [(entry.members["cls"][0], ends[0]), (begins[3], ends[4]), (begins[8], ends[8])]
    preadv, reads = os.preadv, []

    def noted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        reads.append((offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", noted)
    for home in (large, packed):
        reads.clear()
        with closing(open_source(home, "train")) as source:
            source.fetch(0, lambda frames_valid: np.array([0, 3, 4, 8]), False).release()
        assert reads == expected if home == large else len(reads) == 1
