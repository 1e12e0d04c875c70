"""The smaller benchmarks of the loader measure what they say, on a few clips: a busy main thread, reading ahead, shortcuts, processes."""

from __future__ import annotations

import ctypes.util
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F

from benchmarks.ahead import AheadConfig, bench_ahead, slowed
from benchmarks.busy import BusyConfig, bench_busy
from benchmarks.processes import cpu_s, descendants, memory_mb, watch_memory
from benchmarks.result import Result, read_results
from benchmarks.shortcuts import ShortcutsConfig, bench_shortcuts, to_rgb
from benchmarks.turbojpeg import Decoder, find_library
from clips.errors import InputError
from convert.pack import PackConfig, pack
from loaders.sample import Box, View, whole_view
from tests.making import tell_tale_video, write_home
from tests.packing import use_threads

SPEND_CPU = """
import os, sys, time
def spend(): x = sum(range(4_000_000))
if os.fork() == 0:
    spend(); os._exit(0)
os.wait()
spend()
print(time.process_time(), os.times().children_user, flush=True)
sys.stdin.read()
"""
HOLD_MEMORY = """
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 0)
for page in range(0, len(memory), 4096): memory[page] = 1
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight clips in shards, and the same as npz."""
    folder = tmp_path_factory.mktemp("parts")
    home = write_home(folder / "npz", {"train": {"gesture": 5, "nongesture": 3}}, frames=5, height=48, width=64)
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        pack(PackConfig(home, folder / "shards"))
    return folder / "shards", home


def all_finite(results: list[Result]) -> bool:
    return all(math.isfinite(value) for one in results for value in (one.value, *one.spread))


@contextmanager
def child(code: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator[tuple[int, str]]:
    """The id and first line of a process that lives until the body's end."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds) as process:
        assert process.stdout and process.stdin
        yield process.pid, process.stdout.readline()
        process.stdin.close()


def test_cpu_time_of_children_and_theirs_counts_while_they_live_and_afterwards() -> None:
    before, own = cpu_s(), time.process_time()
    with child(SPEND_CPU) as (pid, spent):
        assert pid in descendants()
        childs, grandchilds = map(float, spent.split())
        alive = cpu_s() - before - (time.process_time() - own)
        assert grandchilds > 0.02 and alive >= childs + grandchilds - 0.02  # of ended grandchildren the system counts ticks of 10 ms
    assert pid not in descendants()
    ended = cpu_s() - before - (time.process_time() - own)
    assert alive - 0.02 <= ended < alive + 1


def test_memory_that_two_processes_share_counts_once() -> None:
    num_bytes = 64_000_000 // mmap.PAGESIZE * mmap.PAGESIZE
    descriptor = os.memfd_create("shared")
    os.ftruncate(descriptor, num_bytes)
    before = memory_mb()
    with child(HOLD_MEMORY, str(descriptor), pass_fds=(descriptor,)):
        apart = memory_mb() - before
        assert 60 < apart < 100  # with what Python itself takes
        with mmap.mmap(descriptor, 0) as ours:
            assert sum(ours[:: mmap.PAGESIZE]) == num_bytes // mmap.PAGESIZE
            assert memory_mb() - before < apart + 30
    os.close(descriptor)


def test_the_peak_of_memory_stays_known_when_the_memory_is_gone() -> None:
    with watch_memory() as peak:
        held = np.ones(50_000_000, np.uint8)
        deadline = time.monotonic() + 20
        while peak.mb < 45 and time.monotonic() < deadline:
            time.sleep(0.005)
        del held
    assert 45 < peak.mb < 90


def test_a_busy_main_thread_is_measured_beside_threads_and_a_process(homes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.busy.SETTLE_S", 0.0)
    path, others = tmp_path / "busy.jsonl", descendants()
    results = bench_busy(BusyConfig(homes[0], frames=4, threads=(1,), seconds=0.4, rounds=1, json=path))
    ways = ("no_loader", "threads_1", "process_1")
    expected = {f"busy/{way}/{kind}" for way in ways for kind in ("launches", "launch_share", "without_core", "speed")} - {"busy/no_loader/speed"}
    assert {one.name for one in results} == expected == set(read_results(path))
    assert all_finite(results)
    values = {one.name: one.value for one in results}
    assert values["busy/no_loader/launch_share"] == 100
    assert all(values[f"busy/{way}/speed"] > 0 and values[f"busy/{way}/launches"] > 0 for way in ways[1:])
    assert descendants() == others


def test_reading_ahead_is_measured_with_and_without_slow_storage(homes: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "ahead.jsonl"
    config = AheadConfig(homes[0], frames=4, size=24, threads=1, look_ahead=(0, 8), latency_ms=2, clips=8, rounds=2, json=path)
    results = bench_ahead(config)
    assert {one.name for one in results} == {f"ahead/{number}/{kind}" for number in (0, 8) for kind in ("speed", "speed_slow", "memory")}
    assert all_finite(results) and set(read_results(path)) == {one.name for one in results}
    values = {one.name: one.value for one in results}
    assert values["ahead/0/speed_slow"] < 1000 / 2  # one thread, each clip of which waits 2 ms


def test_slowed_reads_wait_and_share_one_pipe_and_give_the_same_bytes(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    preadv, buffer = os.preadv, bytearray(len(content))
    with slowed(30, 10):  # 30 ms and 10 ms for the bytes
        begin = time.perf_counter()
        assert os.preadv(descriptor, [buffer], 0) == len(content)
        assert time.perf_counter() - begin >= 0.04
    assert os.preadv is preadv and bytes(buffer) == content
    os.close(descriptor)


def test_shortcuts_are_measured_against_the_exact_way(homes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shortcuts.jsonl"
    results = {one.name: one for one in bench_shortcuts(ShortcutsConfig(homes[1], clips=3, frames=4, size=24, rounds=2, json=path))}
    kinds = {"decode", "decode_saved", "finished", "difference_mean", "difference_max"}
    fast = {f"shortcuts/{way}/{kind}" for way in ("fast_upsampling", "fast_DCT", "both_fast") for kind in kinds}
    assert fast | {f"shortcuts/exact/{kind}" for kind in kinds if "difference" not in kind} <= set(results) == set(read_results(path))
    assert all_finite(list(results.values()))
    assert results["shortcuts/exact/decode_saved"].spread == (0, 0)
    assert results["shortcuts/fast_upsampling/difference_max"].value > 0  # the clips are of many colours
    assert "greatest" in capsys.readouterr().out


@pytest.mark.parametrize("flip", [False, True])
def test_planes_become_the_colours_of_the_crop(flip: bool) -> None:
    """Grey of any shape: torch resizes it; one colour throughout: JPEG's formula, written out."""
    luma = torch.arange(4 * 32 * 48).reshape(4, 32, 48).remainder(251).to(torch.uint8)
    box = Box(4, 8, 20, 30)
    found = to_rgb(luma, torch.full((2, 4, 16, 24), 128, dtype=torch.uint8), View(box, flip), 10)
    region = luma[None, :, 4:24, 8:38].float()
    expected = F.interpolate(region, (10, 10), mode="bilinear", align_corners=False)[0].round()
    expected = expected.flip(2) if flip else expected
    assert found.shape == (4, 10, 10, 3)
    assert (found[:, 1:-1, 1:-1].float() - expected[:, 1:-1, 1:-1, None]).abs().max() <= 1
    blue, red = torch.full((1, 4, 16, 24), 90, dtype=torch.uint8), torch.full((1, 4, 16, 24), 150, dtype=torch.uint8)
    one_colour = to_rgb(torch.full_like(luma, 100), torch.cat([blue, red]), View(box, flip), 10)
    assert one_colour.unique(dim=0).reshape(-1, 3).unique(dim=0).tolist() == [[131, 97, 33]]  # 100 + 1.402·22; 100 + .344·38 − .714·22; 100 − 1.772·38


def test_the_smaller_colour_planes_lie_over_their_luma() -> None:
    """A smooth picture, taken apart by JPEG's formula and by averages of 2 x 2 pixels, comes together again."""
    down, across = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    picture = np.stack([50 + 5 * down, 40 + 3 * down + 2 * across, 200 - 5 * across], axis=-1).astype(float)
    luma = picture @ (0.299, 0.587, 0.114)
    differences = np.stack([(picture[..., 2] - luma) / 1.772, (picture[..., 0] - luma) / 1.402]) + 128
    smaller = differences.reshape(2, 1, 16, 2, 16, 2).mean(axis=(3, 5))
    planes = [torch.from_numpy(plane.round().astype(np.uint8)) for plane in (luma[None], smaller)]
    found = to_rgb(planes[0], planes[1], whole_view(32, 32), 32)[0].numpy()
    assert np.abs(found - picture)[2:-2, 2:-2].max() <= 2


def test_a_library_without_the_calls_is_as_none(tmp_path: Path) -> None:
    assert find_library(tmp_path / "missing.so") is None
    assert find_library(Path(ctypes.util.find_library("c") or "libc.so.6")) is None


def test_a_cropped_decode_has_the_pixels_of_the_whole_one() -> None:
    library = find_library(None)
    if library is None:
        pytest.skip("needs libturbojpeg 3")
    frame = tell_tale_video(0, 1, 80, 96)[0]
    blob = simplejpeg.encode_jpeg(frame, quality=90, colorspace="RGB", colorsubsampling="420")
    box, out = Box(19, 37, 33, 41), np.zeros_like(frame)
    decoder = Decoder(library)
    decoder.decode_box(blob, out, box)
    decoder.close()
    inside = np.s_[19:52, 37:78]
    assert np.array_equal(out[inside], simplejpeg.decode_jpeg(blob)[inside])
    assert not out[:16].any() and not out[56:].any()


@pytest.mark.parametrize(
    "config",
    [
        lambda home: BusyConfig(home, rounds=0),
        lambda home: BusyConfig(home, threads=(0,)),
        lambda home: AheadConfig(home, mb_per_s=0),
        lambda home: ShortcutsConfig(home, clips=0),
    ],
)
def test_numbers_that_measure_nothing_are_refused(config: type, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected"):
        config(tmp_path)
