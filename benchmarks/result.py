"""One measured number, in the one format of all benchmarks: JSON lines under benchmarks/results/."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from clips.errors import InputError
from training.machine import describe


@dataclass(frozen=True)
class Result:
    """`value` is the median of `n` measurements, their mean where the name says so; `spread` their least and greatest."""

    name: str
    value: float
    unit: str
    n: int
    spread: tuple[float, float]
    config: dict[str, Any] = field(default_factory=dict)


def result(name: str, unit: str, values: Sequence[float], config: dict[str, Any] | None = None) -> Result:
    middle: Callable[[Sequence[float]], float] = statistics.fmean if name.endswith("_mean") else statistics.median
    return Result(name, middle(values), unit, len(values), (min(values), max(values)), config or {})


def as_word(name: str) -> str:
    """What a table calls `webdataset, device path`, as it stands in a result's name: webdataset_device_path."""
    return name.replace(",", "").replace(" ", "_")


def measure(
    tasks: Mapping[str, Callable[[], object]], num_clips: int | Mapping[str, int], rounds: int, cpu_s: Callable[[], float] = time.process_time
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU ms a clip and clips/s of each task in each round, every second round backwards; one round before warms up.

    `num_clips` are those of one task, or of each; `cpu_s` the clock of CPU seconds, by default this process's own.
    """
    clips = num_clips if isinstance(num_clips, Mapping) else dict.fromkeys(tasks, num_clips)
    cpu_ms: dict[str, list[float]] = {name: [] for name in tasks}
    clips_per_s: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name in list(tasks)[:: 1 if number % 2 else -1]:
            cpu, wall = cpu_s(), time.perf_counter()
            tasks[name]()
            wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
            if number:
                cpu_ms[name].append(1000 * cpu / clips[name])
                clips_per_s[name].append(clips[name] / wall)
    return cpu_ms, clips_per_s


@contextmanager
def pinned_to_one_core() -> Iterator[None]:
    """This thread stays on one of its CPUs, the last, where the system can do that."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if before:
        os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)


def write_results(path: Path, results: Sequence[Result], file_system: str) -> None:
    """Appends one line a result, each with machine, versions and date; not with host, paths or users' names."""
    machine = {name: value for name, value in describe().items() if name not in ("host", "command", "date")}
    where = {"machine": machine, "file_system": file_system, "date": date.today().isoformat()}
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(one) | where) + "\n" for one in results)


def read_results(path: Path) -> dict[str, Result]:
    """Name to the result of that name which was written last; raises InputError where the file is none of `write_results`."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        results = [Result(line["name"], line["value"], line["unit"], line["n"], tuple(line["spread"]), line["config"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected results as JSON lines, which --json of a benchmark writes ({error!r}).") from error
    return {one.name: one for one in results}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: text to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    aligned = [(cell, width, ">" if column else "<") for row in [header, *rows] for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
    cells = [f"{cell:{side}{width}}" for cell, width, side in aligned]
    lines = [cells[start : start + len(header)] for start in range(0, len(cells), len(header))]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * width for width in widths], *lines[1:]])


def cell(values: Sequence[float], digits: int) -> str:
    """`median [least-greatest]` for a table."""
    one = result("", "", values)
    return f"{one.value:.{digits}f} [{one.spread[0]:.{digits}f}-{one.spread[1]:.{digits}f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def file_system_of(path: Path) -> str:
    """The type of the file system that holds `path`, as /proc/mounts names it."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found = line.split()[:3]
        if os.path.commonpath([mount, path.resolve()]) == mount and len(mount) >= len(best):
            best, kind = mount, found
    return kind
