"""The picture of what loaders cost, from results that were measured and committed: no measurement of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clips.errors import InputError

from .result import Result, read_results

LABELS = {
    "floor": "floor: decode alone",
    "floor+read": "floor + read and crc32",
    "webdataset_device_path": "ours, stored frames for a GPU",
    "webdataset_device_path_process": "ours, the same from a process beside",
    "webdataset": "ours, finished batches",
    "webdataset_with_care": "webdataset with care",
    "npz": "ours on the npz folder",
    "webdataset_as_documented": "webdataset as documented",
}
FAMILIES = {"floor": "floor", "floor+read": "floor", "webdataset_with_care": "rival", "webdataset_as_documented": "rival", "npz": "npz"}
OURS = "ours"


@dataclass(frozen=True)
class PlotConfig:
    """Draws the CPU time of each loader, as `python -m benchmarks loader --json` wrote it."""

    results: Path
    """JSON lines of the loader's benchmark."""
    output: Path
    """The PNG to write."""


def plot(config: PlotConfig) -> None:
    """Raises InputError where the results are not the loader's."""
    from .plots import Bar, draw_bars  # matplotlib comes with the extra `train` alone

    found = _of_loaders(config)
    floor = found["floor"]
    bars = [Bar(label, found[name].value, found[name].spread, FAMILIES.get(name, OURS)) for name, label in LABELS.items() if name in found]
    title = f"{floor.config['frames']} frames of {floor.config['size']} px, {floor.config['threads']} threads or workers, all processes, n = {floor.n}"
    draw_bars(config.output, title, "CPU ms a clip", bars, floor.value, "floor")


def _of_loaders(config: PlotConfig) -> Mapping[str, Result]:
    """Name of the loader to its CPU time."""
    found = {name.split("/")[1]: one for name, one in read_results(config.results).items() if name.startswith("loader/") and name.endswith("/cpu")}
    if "floor" not in found:
        raise InputError(f"--results {config.results}: holds no loader/floor/cpu. Measure with python -m benchmarks loader --json {config.results}.")
    return found
