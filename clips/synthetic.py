"""Made-up snippets in the users' very layout: what tests, demos and benchmarks convert and train on.

    write_snippets -> plan_takes (which clips there are) -> puppets.perform (what a clip shows) -> npz

Same arguments, same arrays, whatever the number of threads.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .clip import ClipSpec
from .environment import allocated_cpus
from .errors import InputError
from .mix import permutation
from .puppets import Take, perform, unit

HOME_NAME = "ellen_show_length_1300_sample_rate_1_iou_0.55"
DEFAULT_SPEC = ClipSpec(39, 320, 320)
DEFAULT_CLASSES = ("nongesture", "gesture")
WINDOWS_PER_SOURCE = 6
PADDED_EVERY = 16  # every 16th clip of a split ends in a zero-padded tail


def write_snippets(output: Path, num_clips: int, spec: ClipSpec = DEFAULT_SPEC, classes: Sequence[str] = DEFAULT_CLASSES, seed: int = 0) -> Path:
    """The home folder `OUTPUT/ellen_show_…/SPLIT/CLASS/NUMBER_SOURCE.npz`, complete or absent; the same call again changes nothing.

    About 70, 15 and 15 % of the clips are train, val and test; from three clips a class on, every split has every class.
    Raises InputError when the folder holds other snippets than these.
    """
    if num_clips < 1:
        raise InputError(f"--clips {num_clips}: expected at least 1")
    if not classes or len(set(classes)) < len(classes) or any(name in ("", ".", "..") or Path(name).name != name for name in classes):
        raise InputError(f"--classes {' '.join(classes)}: expected at least one, all different, each the name of a folder")
    home = Path(output) / HOME_NAME
    plan = plan_takes(num_clips, spec.frames, len(classes), seed)
    files = {f"{split}/{classes[take.label]}/{take.window:09d}_{take.source}.npz": take for split, take in plan}
    if home.exists():
        _check_same(home, files, spec, len(classes))
        return home
    part = home.with_name(f"{HOME_NAME}.part-{os.getpid()}")
    try:
        for folder in {(part / name).parent for name in files}:
            folder.mkdir(parents=True)
        with ThreadPoolExecutor(allocated_cpus()) as pool:  # zlib, where most of the time goes, lets other threads run
            list(pool.map(lambda name: _write(part / name, files[name], spec, len(classes)), files))
        part.rename(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return home


def plan_takes(num_clips: int, frames: int, num_classes: int, seed: int) -> list[tuple[str, Take]]:
    """Each clip's split and take: sources of consecutive windows, each in one split; classes come in shuffled rounds."""
    few = max(0, min(num_classes, (num_clips - num_classes) // 2))
    num_val = max(few, round(0.15 * num_clips))
    takes = []
    num_sources = 0
    for split, num in (("train", num_clips - 2 * num_val), ("val", num_val), ("test", num_val)):
        windows = min(WINDOWS_PER_SOURCE, math.ceil(num / 2))  # two sources at least, where a split has two clips
        for number in range(num):
            num_sources += number % windows == 0
            turn, place = divmod(number, num_classes)
            label = int(permutation(num_classes, seed, split, turn)[place])
            padded = 1 + math.floor(unit(seed, split, number, "padding") * frames / 2) if number % PADDED_EVERY == PADDED_EVERY - 1 else 0
            takes.append((split, Take(seed, f"madeup_{num_sources:04d}", number % windows, label, max(1, frames - padded))))
    return takes


def _write(path: Path, take: Take, spec: ClipSpec, num_classes: int) -> None:
    video, keypoints = perform(take, num_classes, spec)
    np.savez_compressed(path, video=video, keypoints=keypoints)


def _check_same(home: Path, files: dict[str, Take], spec: ClipSpec, num_classes: int) -> None:
    """Raises InputError unless `home` holds the planned names and the first one holds what would be written."""
    found = {path.relative_to(home).as_posix() for path in home.rglob("*.npz")}
    name, take = next(iter(files.items()))
    same = found == set(files)
    if same:
        with np.load(home / name, allow_pickle=False) as arrays:
            same = all(np.array_equal(arrays[array], made) for array, made in zip(("video", "keypoints"), perform(take, num_classes, spec), strict=True))
    if not same:
        raise InputError(
            f"{home}: holds {len(found)} snippets that are not the {len(files)} of {spec} with this seed and these classes. "
            "Remove that folder or choose another --output."
        )
