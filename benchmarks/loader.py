"""What a finished batch costs: CPU ms a clip and clips/s of each loader, interleaved in one run, against the floor.

The floor decodes the same frames with the same decoder and threads into one buffer and does nothing else.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from clips.clip import ClipSpec
from clips.errors import InputError
from clips.synthetic import write_snippets
from convert.pack import PackConfig, pack
from loaders.plan import Plan
from loaders.sample import frames_uniform
from loaders.source import ClipSource, loader_for, open_source
from loaders.stream import Loader, default_threads

from .result import Result, cell, result, table, write_results

BATCH = 8
MADE_UP = 48


@dataclass(frozen=True)
class LoaderBenchConfig:
    """CPU ms a clip and clips/s of the loaders to finished batches of 16 frames of 224 pixels."""

    shards: Path | None = None
    """Packed clips; default: made-up ones, packed for the occasion."""
    dataset_home: Path | None = None
    """The same clips as npz: the baseline."""
    split: str = "train"
    """Which split to read."""
    frames: int = 16
    """Frames of a finished clip."""
    size: int = 224
    """Pixels of a finished frame."""
    threads: int | None = None
    """Decoding threads; default as in training."""
    rounds: int = 5
    """Measured passes of each loader, after one that warms up."""
    quick: bool = False
    """Two passes: a first look."""
    json: Path | None = None
    """Append the results here."""


def bench(config: LoaderBenchConfig) -> list[Result]:
    """Prints a table and gives the results."""
    if config.shards is not None:
        return measure(config, config.shards, config.dataset_home)
    with tempfile.TemporaryDirectory() as folder:
        print(f"no --shards: measuring on {MADE_UP} made-up clips")
        home = write_snippets(Path(folder) / "npz", MADE_UP)
        pack(PackConfig(home, Path(folder) / "shards"))
        return measure(config, Path(folder) / "shards", home)


def measure(config: LoaderBenchConfig, shards: Path, npz: Path | None) -> list[Result]:
    threads = config.threads or default_threads(1)
    spec = ClipSpec(config.frames, config.size, config.size)
    torch.set_num_threads(1)  # the resize runs beside the decoding threads, as beside a training step
    tasks: dict[str, Callable[[int], int]] = {}
    homes = {"floor": shards, "webdataset": shards} | ({"npz": npz} if npz else {})
    for name, home in homes.items():
        if name == "npz" and loader_for(home) != "npz":
            raise InputError(f"--dataset-home {home}: expected npz snippets.")
        source = open_source(home, config.split)
        num_clips = len(source.facts)
        plan = Plan(len(source.facts), min(BATCH, len(source.facts)), min(BATCH, len(source.facts)), seed=0)
        if name == "floor":
            tasks[name] = partial(_floor, source, threads, config.frames)
        else:
            tasks[name] = partial(_epoch, Loader(source, plan, spec, torch.device("cpu"), threads))
    cpu_ms, speed = _measure(tasks, 2 if config.quick else config.rounds)
    setting = {"threads": threads, "frames": config.frames, "size": config.size, "batch": BATCH, "clips": num_clips}
    results = [result(f"loader/{name}/cpu", "CPU ms/clip", values, setting) for name, values in cpu_ms.items()]
    results += [result(f"loader/{name}/speed", "clips/s", values, setting) for name, values in speed.items()]
    ratios = {name: [a / b for a, b in zip(values, cpu_ms["floor"], strict=True)] for name, values in cpu_ms.items()}
    results += [result(f"loader/{name}/over_floor", "ratio", values, setting) for name, values in ratios.items()]
    print(_table(cpu_ms, speed, ratios))
    if config.json:
        write_results(config.json, results, file_system_of(shards))
    return results


def _measure(tasks: dict[str, Callable[[int], int]], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU ms a clip and clips/s of each task in each round, all tasks in each round; the first round warms up."""
    cpu_ms: dict[str, list[float]] = {name: [] for name in tasks}
    speed: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            clips = task(number)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                cpu_ms[name].append(1000 * cpu / clips)
                speed[name].append(clips / wall)
    return cpu_ms, speed


def _epoch(loader: Loader, epoch: int) -> int:
    return sum(len(batch) for batch in loader.training(epoch))


def _floor(source: ClipSource, threads: int, frames: int, _: int) -> int:
    buffers = [np.empty((frames, source.stored.height, source.stored.width, 3), np.uint8) for _ in range(threads)]

    def work(thread: int) -> None:
        for number in range(thread, len(source.facts), threads):
            source.load(number, partial(_middle, frames), buffers[thread], False)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return len(source.facts)


def _middle(frames: int, frames_valid: int) -> np.ndarray:
    return frames_uniform(frames, frames_valid, None)


def _table(cpu_ms: dict[str, list[float]], speed: dict[str, list[float]], ratios: dict[str, list[float]]) -> str:
    rows = [[name, cell(cpu_ms[name], 1), cell(speed[name], 0), cell(ratios[name], 2)] for name in cpu_ms]
    return table(["loader", "CPU ms/clip", "clips/s", "over floor"], rows)


def file_system_of(path: Path) -> str:
    """The type of the file system that holds `path`, as /proc/mounts names it."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found = line.split()[:3]
        if os.path.commonpath([mount, path.resolve()]) == mount and len(mount) >= len(best):
            best, kind = mount, found
    return kind
