"""What reading ahead is worth: clips/s and memory against the number of clips that are read ahead, on storage made slow on purpose.

Every read waits for the latency, as on a network; the bytes of all threads' reads go through one pipe of so many MB/s.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from clips.clip import ClipSpec
from clips.errors import InputError
from loaders.stream import default_threads

from .floor import pass_clips
from .loader import BATCH
from .ours import Finished, Setting, opened
from .processes import cpu_s, watch_memory
from .result import Result, cell, file_system_of, measure, result, table, write_results


@dataclass(frozen=True)
class AheadConfig:
    """Clips a second by the number of clips that are read ahead, on the storage as it is and on a slow one."""

    shards: Path
    """Packed clips."""
    split: str = "train"
    """Which split to read."""
    frames: int = 16
    """Frames of a finished clip."""
    size: int = 224
    """Pixels of a finished frame."""
    threads: int | None = None
    """Decoding threads; default as in training."""
    look_ahead: tuple[int, ...] = (0, 8, 16, 32, 64)
    """Numbers of clips to read ahead."""
    latency_ms: float = 20.0
    """What each read of the slow storage waits."""
    mb_per_s: float = 200.0
    """What the slow storage gives to all reads together."""
    clips: int = 240
    """Clips of a pass, at least."""
    rounds: int = 5
    """Measured passes of each, after one that warms up."""
    json: Path | None = None
    """Append the results here."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.latency_ms < 0 or self.mb_per_s <= 0:
            raise InputError(f"--rounds {self.rounds} --latency-ms {self.latency_ms} --mb-per-s {self.mb_per_s}: expected more than 0 (a latency may be 0).")


def bench_ahead(config: AheadConfig) -> list[Result]:
    """Prints a table and gives the results."""
    threads = config.threads or default_threads()
    chosen = pass_clips(config.shards, config.split, config.frames, config.clips, 1)
    spec = ClipSpec(config.frames, config.size, config.size)
    batch = min(BATCH, chosen.num_clips)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    readers: dict[int, Finished] = {}
    memory: dict[int, float] = {}
    try:
        for number in config.look_ahead:
            with watch_memory() as peak:
                readers[number] = Finished(chosen, Setting(spec, batch, threads, number), opened(config.shards, chosen))
                _drain(readers[number])
            memory[number] = peak.mb
        tasks: dict[str, Callable[[], object]] = {f"as it is/{number}": partial(_drain, reader) for number, reader in readers.items()}
        tasks |= {f"slow/{number}": partial(_drain_slowly, config, reader) for number, reader in readers.items()}
        _, speed = measure(tasks, chosen.num_clips // batch * batch, config.rounds, cpu_s)
    finally:
        torch.set_num_threads(before)
        for reader in readers.values():
            reader.close()
    setting = {"threads": threads, "frames": config.frames, "size": config.size, "batch": batch, "clips": chosen.num_clips}
    slow = {"latency_ms": config.latency_ms, "mb_per_s": config.mb_per_s}
    results = [result(f"ahead/{number}/speed", "clips/s", speed[f"as it is/{number}"], setting) for number in readers]
    results += [result(f"ahead/{number}/speed_slow", "clips/s", speed[f"slow/{number}"], setting | slow) for number in readers]
    results += [result(f"ahead/{number}/memory", "MB", [memory[number]], setting) for number in readers]
    rows = [[str(number), cell(speed[f"as it is/{number}"], 0), cell(speed[f"slow/{number}"], 0), f"{memory[number]:.0f}"] for number in readers]
    print(table(["clips read ahead", "clips/s", f"at {config.latency_ms:g} ms, {config.mb_per_s:g} MB/s", "memory, MB"], rows))
    if config.json:
        write_results(config.json, results, file_system_of(config.shards))
    return results


def _drain(reader: Finished) -> None:
    for _ in reader.clips():
        pass


def _drain_slowly(config: AheadConfig, reader: Finished) -> None:
    with slowed(config.latency_ms, config.mb_per_s):
        _drain(reader)


@contextmanager
def slowed(latency_ms: float, mb_per_s: float) -> Iterator[None]:
    """While it lasts, os.preadv in this process is slow: after the latency come the bytes, one read's after the other's."""
    preadv, lock = os.preadv, threading.Lock()
    pipe_free_s = 0.0

    def slow(descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:  # Any: whatever is a buffer
        nonlocal pipe_free_s
        count = preadv(descriptor, buffers, offset, flags)
        asked_s = time.perf_counter()
        with lock:
            pipe_free_s = max(pipe_free_s, asked_s + latency_ms / 1000) + count / (mb_per_s * 1e6)
            there_s = pipe_free_s
        time.sleep(max(0.0, there_s - asked_s))
        return count

    with patch.object(os, "preadv", slow):
        yield
