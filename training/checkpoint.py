"""The states from which a run continues: RUN/checkpoints/step-000000123.pt, the last two of them."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clips.errors import InputError
from clips.files import whole_file

logger = logging.getLogger(__name__)

KEEP = 2  # the last one, and the one before should the last be damaged
PLAIN = (type(None), bool, int, float, str, bytes)


@dataclass(frozen=True)
class KeepConfig:
    """When checkpoints are written, and what a finished run keeps."""

    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints inside an epoch; one is also written at each epoch's end and when a signal asks the run to end."""
    keep_optimizer: bool = False
    """Keep the optimiser's state of a finished run, so that more --epochs later go on exactly."""

    def __post_init__(self) -> None:
        if not self.checkpoint_minutes > 0:
            raise InputError(f"--checkpoint-minutes {self.checkpoint_minutes}: expected more than 0.")


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:  # Any: tensors and plain values, nested
    """Writes `state` for the run in `folder` and removes what is no longer needed; only one process may call this.

    TypeError for anything that `load_last` could not read back, named by its place in the state.
    """
    check_plain(state, "state")
    checkpoints = folder / "checkpoints"
    path = checkpoints / f"step-{step:09d}.pt"
    for leftover in checkpoints.glob(".step-*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    with whole_file(path) as file:
        torch.save(state, file)
    remove_others(path)
    return path


def slim(folder: Path, names: Collection[str]) -> None:
    """The last state without the parts of these names, and no other: for a run that has ended."""
    state = load_last(folder)
    if state is not None and any(name in state for name in names):
        kept = save(folder, state["progress"]["step"], {name: part for name, part in state.items() if name not in names})
        for other in saved(kept.parent):
            if other != kept:
                other.unlink()


def load_last(folder: Path) -> dict[str, Any] | None:  # Any: as in `save`
    """The newest readable state of the run in `folder`, on the CPU; None when there is none yet; InputError when all are damaged."""
    paths = saved(folder / "checkpoints")
    for path in reversed(paths):
        try:
            return read(path)
        except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError) as error:  # what 3000 cut, flipped and zeroed files raised
            logger.warning("%s: damaged (%s); trying the checkpoint before it", path, str(error).strip().split("\n")[0])
    if paths:
        raise InputError(
            f"{folder / 'checkpoints'}: expected a readable checkpoint, found {len(paths)} damaged ones. "
            "Copy one back from a backup, or remove the folder to start the run from its first step."
        )
    return None


def read(path: Path) -> dict[str, Any]:  # Any: as in `save`
    """The state in one file, its CRC-32 sums checked: torch.load itself takes a flipped bit for a weight. (Measured: 0.2 s for 400 MB.)"""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} has another CRC-32 than it was written with")
    return torch.load(path, map_location="cpu", weights_only=True)


def saved(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, the oldest first."""
    return sorted(checkpoints.glob("step-*.pt"))


def remove_others(path: Path) -> None:
    """Keeps `path` and the one before it. Later steps are damaged ones that the run continued without, and would hide this one."""
    paths = saved(path.parent)
    place = paths.index(path)
    for other in [*paths[: max(0, place + 1 - KEEP)], *paths[place + 1 :]]:
        other.unlink()


def check_plain(value: Any, place: str) -> None:  # Any: that is the question
    """Raises TypeError unless torch.load(weights_only=True) will read `value`; found when it is saved, not when a run must continue."""
    if isinstance(value, torch.Tensor) or type(value) in PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_plain(key, f"a key of {place}")
            check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{place}[{index}]")
    else:
        raise TypeError(f"{place} is a {type(value).__module__}.{type(value).__qualname__}; expected tensors, numbers, text, lists and dicts.")
