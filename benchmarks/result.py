"""One measured number, in the one format of all benchmarks: JSON lines under benchmarks/results/."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from training.machine import describe


@dataclass(frozen=True)
class Result:
    """`value` is the median of `n` measurements, `spread` their least and greatest."""

    name: str
    value: float
    unit: str
    n: int
    spread: tuple[float, float]
    config: dict[str, Any] = field(default_factory=dict)


def result(name: str, unit: str, values: Sequence[float], config: dict[str, Any] | None = None) -> Result:
    return Result(name, statistics.median(values), unit, len(values), (min(values), max(values)), config or {})


def write_results(path: Path, results: Sequence[Result], file_system: str) -> None:
    """Appends one line a result, each with machine, versions and date; not with host, paths or users' names."""
    machine = {name: value for name, value in describe().items() if name not in ("host", "command", "date")}
    where = {"machine": machine, "file_system": file_system, "date": date.today().isoformat()}
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(one) | where) + "\n" for one in results)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: text to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    aligned = [(cell, width, ">" if column else "<") for row in [header, *rows] for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
    cells = [f"{cell:{side}{width}}" for cell, width, side in aligned]
    lines = [cells[start : start + len(header)] for start in range(0, len(cells), len(header))]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * width for width in widths], *lines[1:]])
