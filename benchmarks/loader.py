"""What a finished batch costs: CPU time, clips/s, time to the first batch and memory of each loader, interleaved in one run, against the floor.

floor, floor+read                    decode alone, see floor.py
webdataset, npz                      our loader to finished batches, from shards and from the unconverted folder
dali                                 the same from shards by DALI's CPU operators (`--dali`): for a GPU there is `python -m benchmarks fed`
webdataset, device path (, process)  our loader up to the stored frames that a GPU would get, decoded here or in a process beside
webdataset as documented, with care  webdataset without our loader, on the same tars: see rivals.py

All processes count. Workers start before anything is timed; their start is in the time to the first batch, imports are not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from clips.clip import ClipSpec
from clips.errors import InputError
from clips.manifest import read_manifest
from clips.synthetic import write_snippets
from convert.pack import PackConfig, pack
from loaders.source import loader_for
from loaders.stream import default_threads

from .floor import Floor, PassClips, pass_clips
from .ours import Finished, HandedOver, Setting, opened
from .processes import cpu_s, watch_memory
from .result import Result, as_word, cell, file_system_of, measure, result, table, write_results

BATCH = 8
MADE_UP, QUICK_MADE_UP = 48, 24
MEMORY_PASSES = 3
QUICK_CLIPS, QUICK_ROUNDS = 24, 2
LEGEND = """floor decodes and does nothing else, floor+read reads too: "over floor" is how much more CPU time a row takes than decoding alone.
webdataset and npz are our loader to finished batches, from shards and from npz; device path gives stored frames for a GPU, decoded here or in a process;
dali is the same by DALI's CPU operators; as documented and with care are webdataset without our loader.
Less CPU ms/clip and more clips/s are better; rows whose [least-greatest] overlap are alike."""
Values = dict[str, list[float]]  # name of a way to one value a round


@dataclass(frozen=True)
class LoaderBenchConfig:
    """What finished batches of 16 frames of 224 pixels cost: our loaders, webdataset without them, and the floor."""

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
    """Decoding threads, and webdataset's worker processes; default as in training."""
    clips: int = 240
    """Clips of a pass, at least: the split's first shards, or all of them several times."""
    rounds: int = 5
    """Measured passes of each loader, after one that warms up."""
    rivals: bool = True
    """Measure webdataset without our loader, too."""
    dali: bool = False
    """Measure our loader with DALI's CPU operators, too, where DALI is installed."""
    quick: bool = False
    """Two short passes: a first look."""
    json: Path | None = None
    """Append the results here."""


class Reader(Protocol):
    """A loader that has begun: its workers may take a pass to come up."""

    def clips(self) -> Iterator[int]:
        """One pass: the number of clips of each batch, when it is there."""

    def close(self) -> None:
        """Ends its workers."""


@dataclass(frozen=True)
class Way:
    """One row: `open` reads what stands beside the clips, `start` makes a loader of it."""

    name: str
    num_clips: int
    open: Callable[[], Any]  # Any: whatever `start` takes
    start: Callable[[Any], Reader]
    makes_batches: bool = True


def bench(config: LoaderBenchConfig) -> list[Result]:
    """Prints a table and gives the results."""
    if config.shards is not None:
        return on_clips(config, config.shards, config.dataset_home)
    if config.dataset_home is not None:
        raise InputError("--dataset-home: is the baseline beside --shards. Give --shards too, the same clips packed.")
    with tempfile.TemporaryDirectory() as folder:
        made_up = QUICK_MADE_UP if config.quick else MADE_UP
        print(f"no --shards: measuring on {made_up} made-up clips")
        home = write_snippets(Path(folder) / "npz", made_up)
        pack(PackConfig(home, Path(folder) / "shards"))
        return on_clips(config, Path(folder) / "shards", home)


def on_clips(config: LoaderBenchConfig, shards: Path, npz: Path | None) -> list[Result]:
    """The measurement itself, on shards and, where given, on the same clips as npz."""
    if npz is not None and loader_for(npz) != "npz":
        raise InputError(f"--dataset-home {npz}: expected npz snippets.")
    threads = config.threads or default_threads()
    chosen = pass_clips(shards, config.split, config.frames, QUICK_CLIPS if config.quick else config.clips, threads)
    setting = Setting(ClipSpec(config.frames, config.size, config.size), min(BATCH, chosen.num_clips), threads)
    ways = _ways(chosen, setting, npz, config.rivals, config.dali)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # what the main thread does beside the decoding threads, as beside a training step
    try:
        results = _measured(ways, QUICK_ROUNDS, 1, 1) if config.quick else _measured(ways, config.rounds, config.rounds, MEMORY_PASSES)
    finally:
        torch.set_num_threads(before)
    facts = {"threads": threads, "frames": config.frames, "size": config.size, "batch": setting.batch, "clips": chosen.num_clips}
    found = [result(f"loader/{as_word(name)}/{kind}", unit, values, facts) for kind, unit, of in results for name, values in of.items()]
    print(_table([way.name for way in ways], {kind: of for kind, _, of in results}))
    print(LEGEND)
    if config.json:
        write_results(config.json, found, file_system_of(shards))
    return found


def _ways(chosen: PassClips, setting: Setting, npz: Path | None, rivals: bool, dali: bool) -> list[Way]:
    full = chosen.num_clips // setting.batch * setting.batch  # our loader leaves out what fills no batch
    shards = partial(opened, chosen.home, chosen)
    ways = [
        Way("floor", chosen.num_clips, lambda: False, partial(Floor, chosen, setting.threads), False),
        Way("floor+read", chosen.num_clips, lambda: True, partial(Floor, chosen, setting.threads), False),
        Way("webdataset", full, shards, partial(Finished, chosen, setting)),
        Way("webdataset, device path", full, shards, partial(HandedOver, chosen, setting, "threads")),
        Way("webdataset, device path, process", full, shards, partial(HandedOver, chosen, setting, "process")),
    ]
    if dali:
        ways.append(Way("dali", full, partial(opened, chosen.home, chosen, "dali"), partial(Finished, chosen, setting)))
    if npz is not None:
        ways.append(Way("npz", full, partial(opened, npz, chosen), partial(Finished, chosen, setting)))
    if rivals and read_manifest(chosen.home).codec != "jpeg":
        print("webdataset without our loader is left out: it is written for jpeg alone")
    elif rivals:
        from .rivals import Rival, Task, careful, documented

        task = Task(setting.spec.frames, setting.spec.height, setting.batch, setting.threads)
        tars = [str(tar) for tar in chosen.tars] * chosen.times
        for name, make in {"webdataset as documented": documented, "webdataset with care": careful}.items():
            ways.append(Way(name, chosen.num_clips, lambda: tars, partial(Rival, make, task)))
    return ways


def _measured(ways: Sequence[Way], rounds: int, num_starts: int, memory_passes: int) -> list[tuple[str, str, Values]]:
    """Kind, unit and values of all that is measured; first the starts and the memory, then passes of loaders that stay."""
    starts = [{way.name: _start_ms(way) for way in ways if way.makes_batches} for _ in range(num_starts + 1)][1:]
    first_ms, open_and_first_ms = ({name: [one[name][place] for one in starts] for name in starts[0]} for place in (0, 1))
    memory = {way.name: [_memory_mb(way) for _ in range(memory_passes)] for way in ways if way.makes_batches}
    readers = {way.name: way.start(way.open()) for way in ways}
    try:
        tasks = {way.name: partial(_drain, way, readers[way.name]) for way in ways}
        cpu_ms, speed = measure(tasks, {way.name: way.num_clips for way in ways}, rounds, cpu_s)
    finally:
        for reader in reversed(readers.values()):  # forked workers hold what was open when they began: they go first
            reader.close()
    over_floor = {name: [a / b for a, b in zip(values, cpu_ms["floor"], strict=True)] for name, values in cpu_ms.items()}
    return [
        ("cpu", "CPU ms/clip", cpu_ms),
        ("over_floor", "ratio", over_floor),
        ("speed", "clips/s", speed),
        ("first_batch", "ms", first_ms),
        ("open_and_first_batch", "ms", open_and_first_ms),
        ("memory", "MB", memory),
    ]


def _drain(way: Way, reader: Reader) -> None:
    if (num_clips := sum(reader.clips())) != way.num_clips:
        raise RuntimeError(f"{way.name} gave {num_clips} clips in a pass; expected {way.num_clips}")


def _start_ms(way: Way) -> tuple[float, float]:
    """To the first batch: from what is open already, and from nothing."""
    begin = time.perf_counter()
    material = way.open()
    is_open = time.perf_counter()
    reader = way.start(material)
    try:
        next(reader.clips())
        end = time.perf_counter()
    finally:
        reader.close()
    return 1000 * (end - is_open), 1000 * (end - begin)


def _memory_mb(way: Way) -> float:
    """The most that one pass holds, opening included."""
    with watch_memory() as peak:
        reader = way.start(way.open())
        try:
            _drain(way, reader)
        finally:
            reader.close()
    return peak.mb


def _table(names: Sequence[str], found: Mapping[str, Values]) -> str:
    columns = {"cpu": ("CPU ms/clip", 1), "over_floor": ("over floor", 2), "speed": ("clips/s", 0)}
    columns |= {"first_batch": ("first batch, ms", 0), "open_and_first_batch": ("with opening, ms", 0), "memory": ("memory, MB", 0)}
    rows = [[name, *(cell(found[kind][name], digits) if name in found[kind] else "-" for kind, (_, digits) in columns.items())] for name in names]
    return table(["loader", *(title for title, _ in columns.values())], rows)
