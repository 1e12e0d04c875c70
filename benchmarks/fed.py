"""Clips per second of a training that a loader feeds, by loader and decoding threads, against the same step on a batch that lies on the device.

    shards -> Loader -> batch -> our step, as in `python -m benchmarks step`        cached: one such batch -> the same step

Random weights, nothing downloaded. Each measurement starts its loader anew and ends it, so that ways do not share the machine; rounds are
interleaved. Every result is written when it is measured: of a run that is killed the last line of a name counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from clips.errors import InputError
from clips.synthetic import write_snippets
from convert.pack import PackConfig, pack
from loaders.batch import Batch
from loaders.plan import Plan
from loaders.source import open_source
from loaders.stream import HW_DECODER_LOAD, Loader
from training.distributed import Group
from training.precision import Precision

from .decode_ways import why_not
from .floor import EPOCH, SEED
from .loader import MADE_UP, QUICK_MADE_UP
from .ours import PREFETCH
from .processes import cpu_s
from .result import Result, cell, file_system_of, result, table, write_results
from .step import Name

if TYPE_CHECKING:
    from .step_sides import Ours

LoaderName = Literal["webdataset", "dali"]
CACHED = "cached"
GPU_BATCH, CPU_BATCH = 64, 2
WARM_UP, LEAST_STEPS = 5, 5
PASS_CLIPS = 100_000  # of an epoch, the same ones again and again: rarely one ends while something is measured
AIMS = ((4, 3.0), (2, 10.0))  # from so many threads on, by how many % a loader may hold a GPU back at most


@dataclass(frozen=True)
class FedConfig:
    """Training clips a second with each loader and number of threads, against the step on a cached batch."""

    shards: Path | None = None
    """Packed clips; default: made-up ones, packed for the occasion."""
    split: str = "train"
    """Which split to read, again and again."""
    model_name: Name = "videomae-base"
    """A published architecture, or a small one for tests, with random weights."""
    loader: tuple[LoaderName, ...] = ("webdataset", "dali")
    """Those not at hand are named."""
    threads: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Decoding threads."""
    hw_decoder_load: float = HW_DECODER_LOAD
    """As in training."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """As in training: bf16 where the GPU has it, fp32 on a CPU."""
    micro_batch: int | None = None
    """Clips of a step; default: the largest divisor of 64 that fits into the GPU, 2 on a CPU."""
    compiled: bool = False
    """torch.compile the model: a faster step asks more of the loaders."""
    seconds: float = 5.0
    """Of a measurement, about."""
    rounds: int = 3
    """Measurements of each way, interleaved."""
    minutes: float = 8.0
    """What does not fit is left out and named."""
    quick: bool = False
    """A small model, one and two threads: whether it runs, not how fast."""
    json: Path | None = None
    """Append the results here, each when it is measured."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.seconds > 0 or not self.minutes > 0 or not self.threads or min(self.threads) < 1:
            raise InputError(f"--rounds {self.rounds} --seconds {self.seconds} --minutes {self.minutes} --threads {self.threads}: expected more than 0.")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"--micro-batch {self.micro_batch}: expected at least 1.")
        if not 0 <= self.hw_decoder_load <= 1:
            raise InputError(f"--hw-decoder-load {self.hw_decoder_load}: expected 0 … 1.")


@dataclass
class Row:
    """One way, one value a round; of the cached batch no share and no wait."""

    loader: str
    threads: int
    clips_per_s: list[float] = field(default_factory=list)
    of_cached: list[float] = field(default_factory=list)
    wait: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.loader if self.loader == CACHED else f"{self.loader}/{self.threads}_threads"

    def results(self, prefix: str, facts: dict[str, Any]) -> list[Result]:  # Any: JSON
        of = {"speed": ("clips/s", self.clips_per_s), "of_cached": ("%", self.of_cached), "wait": ("%", self.wait), "cpu": ("CPU ms/clip", self.cpu_ms)}
        told = facts | {"threads": self.threads, "load": round(os.getloadavg()[0], 1)}
        return [result(f"{prefix}/{self.name}/{kind}", unit, values, told) for kind, (unit, values) in of.items() if values]


def bench_fed(config: FedConfig) -> list[Result]:
    """Prints a table and how the aims stand, and gives the results."""
    if config.quick:
        config = replace(config, model_name="videomae-tiny", threads=config.threads[:2], seconds=min(config.seconds, 0.1), rounds=min(config.rounds, 2))
    if config.shards is not None:
        return _on_shards(config, config.shards)
    with tempfile.TemporaryDirectory() as folder:
        made_up = QUICK_MADE_UP if config.quick else MADE_UP
        _say(f"no --shards: {made_up} made-up clips, which compress otherwise than real ones")
        pack(PackConfig(write_snippets(Path(folder) / "npz", made_up), Path(folder) / "shards"))
        return _on_shards(config, Path(folder) / "shards")


def _on_shards(config: FedConfig, shards: Path) -> list[Result]:
    from .step_sides import Ours, random_model  # transformers takes seconds

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    group, precision = Group(0, 1, 0, device, "single"), Precision(config.precision, device)
    source = open_source(shards, config.split)
    stored = source.stored
    source.close()
    side = Ours(random_model(config.model_name, "native", stored), precision)
    size = config.micro_batch or side.largest(GPU_BATCH if device.type == "cuda" else CPU_BATCH, group)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    _say(f"{config.model_name} {side.model.spec}, {size} clips a step, {precision.mode} on {gpu or 'a CPU'}{', compiled' if config.compiled else ''}")
    facts = {"model": config.model_name, "clips": str(side.model.spec), "micro_batch": size, "precision": precision.mode, "compiled": config.compiled}
    facts |= {"stored": [stored.height, stored.width], "hw_decoder_load": config.hw_decoder_load}
    rows = [Row(CACHED, 0)]
    for loader in config.loader:
        reason = why_not("dali-cpu" if gpu is None else "dali-mixed") if loader == "dali" else None
        if reason:
            _say(f"{loader}: not measured, {reason}")
        else:
            rows += [Row(loader, threads) for threads in config.threads]
    found = _measured(config, shards, side, size, rows, facts, _Feed(config, shards, side, size).opened)
    print(_table(rows))
    print(verdict(rows, gpu))
    return found


@dataclass(frozen=True)
class _Feed:
    """What a way's batches come from."""

    config: FedConfig
    shards: Path
    side: Ours
    size: int

    @contextmanager
    def opened(self, row: Row) -> Iterator[Iterator[Batch]]:
        """Batches without end; the loader, and its process, end with the context."""
        if row.loader == CACHED:
            yield repeat(self.side.batch(self.size))
            return
        source, config = open_source(self.shards, self.config.split, row.loader), self.config
        numbers = np.resize(np.arange(len(source.facts)), PASS_CLIPS)
        plan = Plan(len(numbers), self.size, self.size, SEED)
        how: dict[str, Any] = {"hw_decoder_load": config.hw_decoder_load}
        loader = Loader(source, plan, self.side.model.spec, self.side.precision.device, row.threads, PREFETCH, numbers.tolist(), **how)
        batches = _epochs(loader)
        try:
            yield batches
        finally:
            batches.close()
            loader.close()


def _epochs(loader: Loader) -> Generator[Batch, None, None]:
    for epoch in count(EPOCH):
        yield from loader.training(epoch)


Opened = Callable[[Row], Any]  # Any: a context manager of batches


def _measured(config: FedConfig, shards: Path, side: Ours, size: int, rows: list[Row], facts: dict[str, Any], opened: Opened) -> list[Result]:
    """All ways in turn, every second round backwards but the cached batch, which each round begins with."""
    forward: Any = torch.compile(side.module, dynamic=False) if config.compiled else side.module  # Any: a module of a module
    found: dict[str, Result] = {}
    end_s, file_system = time.perf_counter() + 60 * config.minutes, file_system_of(shards)
    for number in range(config.rounds):
        for row in [rows[0], *rows[1:][:: -1 if number % 2 else 1]]:
            if time.perf_counter() > end_s:
                _say(f"{row.name}: round {number + 1} left out, --minutes {config.minutes:g} are over")
                continue
            with opened(row) as batches:
                _measure(row, rows[0], side, forward, batches, size, config.seconds)
            results = row.results(f"fed/{config.model_name}", facts)
            found |= {one.name: one for one in results}
            if config.json:
                write_results(config.json, results, file_system)
            _say(f"{row.name}: {row.clips_per_s[-1]:.4g} clips/s, round {number + 1}")
    if side.loss() is None:
        raise InputError("a loss was not finite: skipped updates cost less, so these numbers say nothing. Try --precision bf16 or fp32.")
    return list(found.values())


def _measure(row: Row, cached: Row, side: Ours, forward: Any, batches: Iterator[Batch], size: int, seconds: float) -> None:
    """One round of a way: steps that warm up, then steps for that long."""
    device = side.precision.device
    for _ in range(WARM_UP):
        side.step(forward, next(batches))
    _wait(device)
    steps, wait_s, cpu, begin = 0, 0.0, cpu_s(), time.perf_counter()
    while steps < LEAST_STEPS or time.perf_counter() - begin < seconds:
        asked = time.perf_counter()
        batch = next(batches)
        wait_s += time.perf_counter() - asked
        side.step(forward, batch)
        steps += 1
    _wait(device)
    wall_s = time.perf_counter() - begin
    row.clips_per_s.append(steps * size / wall_s)
    row.cpu_ms.append(1000 * (cpu_s() - cpu) / (steps * size))
    if row is not cached:
        row.of_cached.append(100 * row.clips_per_s[-1] / cached.clips_per_s[-1])
        row.wait.append(100 * wait_s / wall_s)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(rows: list[Row]) -> str:
    header = ["loader", "threads", "clips/s", "of the cached batch, %", "waiting for data, %", "CPU ms/clip"]
    cells = [
        [
            *(row.loader, str(row.threads) if row.threads else "-", cell(row.clips_per_s, 1 if max(row.clips_per_s) > 10 else 3)),
            *(cell(values, digits) if values else "-" for values, digits in ((row.of_cached, 1), (row.wait, 1), (row.cpu_ms, 1))),
        ]
        for row in rows
        if row.clips_per_s
    ]
    return table(header, cells)


def verdict(rows: list[Row], gpu: str | None) -> str:
    """How the aims stand, where a GPU ran."""
    aims = ", ".join(f"{most:g} % with {threads} threads" for threads, most in AIMS)
    if gpu is None:
        return f"The aims (held back by no more than {aims}) are a GPU's: a CPU's numbers say nothing about them."
    said = []
    for row in rows:
        most = next((most for threads, most in AIMS if row.threads >= threads), None)
        if row.of_cached and most is not None:
            held = 100 - result("", "", row.of_cached).value
            said.append(f"{row.loader} with {row.threads} threads {held:.1f} % ({'reached' if held <= most else 'missed'})")
    return f"Held back on {gpu}, aim no more than {aims}: {', '.join(said) or 'not measured'}."


def _say(line: str) -> None:
    print(line, flush=True)
