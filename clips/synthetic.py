"""Made-up snippets in the users' very layout, whose classes differ in motion alone.

What a clip shows is in puppets.py; here is which clips there are: sources of up to six consecutive windows, each source in
one split, its windows of all classes. Same arguments, same arrays, whatever the number of threads.

    write_snippets -> plan_snippets -> puppets.perform -> npz
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
    if not classes or len(set(classes)) < len(classes) or any(Path(name).name != name for name in classes):
        raise InputError(f"--classes {' '.join(classes)}: expected different folder names, at least one")
    home = Path(output) / HOME_NAME
    plan = plan_snippets(num_clips, spec.frames, len(classes), seed)
    if home.exists():
        check_same(home, plan, spec, classes, seed)
        return home
    part = home.with_name(f"{HOME_NAME}.part-{os.getpid()}")
    try:
        with ThreadPoolExecutor(allocated_cpus()) as pool:  # zlib drops the GIL
            list(pool.map(lambda snippet: write_snippet(part, snippet, spec, classes, seed), plan))
        part.rename(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return home


def plan_snippets(num_clips: int, frames: int, num_classes: int, seed: int) -> list[MadeUpSnippet]:
    """What to write, in order: classes come in shuffled rounds, sources in runs of up to six windows."""
    few = max(0, min(num_classes, (num_clips - num_classes) // 2))
    num_val = max(few, round(0.15 * num_clips))
    plan: list[MadeUpSnippet] = []
    num_sources = 0
    for split, num in (("train", num_clips - 2 * num_val), ("val", num_val), ("test", num_val)):
        windows = min(WINDOWS_PER_SOURCE, math.ceil(num / 2))  # two sources at least, so that folds by source exist
        for number in range(num):
            if number % windows == 0:
                num_sources += 1
            turn, place = divmod(number, num_classes)
            label = sorted(range(num_classes), key=lambda k: unit(seed, split, turn, "class", k))[place]
            padding = 1 + int(unit(seed, split, number, "padding") * frames / 2) if number % PADDED_EVERY == PADDED_EVERY - 1 else 0
            plan.append(MadeUpSnippet(split, label, f"madeup_{num_sources:04d}", number % windows, max(1, frames - padding)))
    return plan


def write_snippet(home: Path, snippet: MadeUpSnippet, spec: ClipSpec, classes: Sequence[str], seed: int) -> None:
    folder = home / snippet.split / classes[snippet.label]
    folder.mkdir(parents=True, exist_ok=True)
    video, keypoints = perform(snippet.take(seed), snippet.label, len(classes), spec, snippet.frames_valid)
    np.savez_compressed(folder / snippet.name, video=video, keypoints=keypoints)


def check_same(home: Path, plan: Sequence[MadeUpSnippet], spec: ClipSpec, classes: Sequence[str], seed: int) -> None:
    """Raises InputError unless `home` holds the planned names and the first one holds what would be written."""
    expected = {f"{snippet.split}/{classes[snippet.label]}/{snippet.name}" for snippet in plan}
    found = {path.relative_to(home).as_posix() for path in home.rglob("*.npz")}
    same = expected == found
    if same:
        first = home / plan[0].split / classes[plan[0].label] / plan[0].name
        video, keypoints = perform(plan[0].take(seed), plan[0].label, len(classes), spec, plan[0].frames_valid)
        with np.load(first, allow_pickle=False) as arrays:
            same = np.array_equal(arrays["video"], video) and np.array_equal(arrays["keypoints"], keypoints)
    if not same:
        raise InputError(
            f"{home}: holds {len(found)} snippets that differ from the {len(expected)} of {spec} asked for with seed {seed}. "
            f"Remove that folder or choose another --output."
        )
