"""What a finished batch costs: CPU ms a clip and clips/s of each loader, interleaved in one run, against the floor.

The floor decodes the same frames with the same decoder and threads into one buffer and does nothing else.
"""

from __future__ import annotations

import tempfile
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

from .result import Result, cell, file_system_of, measure, result, table, write_results

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
        return on_clips(config, config.shards, config.dataset_home)
    with tempfile.TemporaryDirectory() as folder:
        print(f"no --shards: measuring on {MADE_UP} made-up clips")
        home = write_snippets(Path(folder) / "npz", MADE_UP)
        pack(PackConfig(home, Path(folder) / "shards"))
        return on_clips(config, Path(folder) / "shards", home)


def on_clips(config: LoaderBenchConfig, shards: Path, npz: Path | None) -> list[Result]:
    """The measurement itself, on shards and, where given, on the same clips as npz."""
    if npz is not None and loader_for(npz) != "npz":
        raise InputError(f"--dataset-home {npz}: expected npz snippets.")
    threads = config.threads or default_threads()
    spec = ClipSpec(config.frames, config.size, config.size)
    homes = {"webdataset": shards} | ({"npz": npz} if npz else {})
    sources = {name: open_source(home, config.split) for name, home in homes.items()}
    num_clips = len(sources["webdataset"].facts)
    batch = min(BATCH, num_clips)
    plan = Plan(num_clips // batch * batch, batch, batch, seed=0)
    whole = list(range(plan.num_clips))
    loaders = {name: Loader(source, plan, spec, torch.device("cpu"), threads, subset=whole) for name, source in sources.items()}
    tasks: dict[str, Callable[[], object]] = {"floor": partial(_floor, sources["webdataset"], threads, config.frames, plan.num_clips)}
    tasks |= {name: partial(_epoch, loader) for name, loader in loaders.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the resize runs beside the decoding threads, as beside a training step
    try:
        cpu_ms, speed = measure(tasks, plan.num_clips, 2 if config.quick else config.rounds)
    finally:
        torch.set_num_threads(before)
        for loader in loaders.values():
            loader.close()
    setting = {"threads": threads, "frames": config.frames, "size": config.size, "batch": batch, "clips": plan.num_clips}
    results = [result(f"loader/{name}/cpu", "CPU ms/clip", values, setting) for name, values in cpu_ms.items()]
    results += [result(f"loader/{name}/speed", "clips/s", values, setting) for name, values in speed.items()]
    ratios = {name: [a / b for a, b in zip(values, cpu_ms["floor"], strict=True)] for name, values in cpu_ms.items()}
    results += [result(f"loader/{name}/over_floor", "ratio", values, setting) for name, values in ratios.items()]
    print(_table(cpu_ms, speed, ratios))
    if config.json:
        write_results(config.json, results, file_system_of(shards))
    return results


def _epoch(loader: Loader) -> None:
    for _ in loader.training(0):
        pass


def _floor(source: ClipSource, threads: int, frames: int, num_clips: int) -> None:
    buffers = [np.empty((frames, source.stored.height, source.stored.width, 3), np.uint8) for _ in range(threads)]

    def work(thread: int) -> None:
        for number in range(thread, num_clips, threads):
            source.load(number, partial(_middle, frames), buffers[thread], False)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def _middle(frames: int, frames_valid: int) -> np.ndarray:
    return frames_uniform(frames, frames_valid, None)


def _table(cpu_ms: dict[str, list[float]], speed: dict[str, list[float]], ratios: dict[str, list[float]]) -> str:
    rows = [[name, cell(cpu_ms[name], 1), cell(speed[name], 0), cell(ratios[name], 2)] for name in cpu_ms]
    return table(["loader", "CPU ms/clip", "clips/s", "over floor"], rows)
