"""The source: npz snippets under HOME/SPLIT/CLASS/*.npz. Find them, check them, read one.

find -> check_headers (all files, before any work) -> read (one file, every value checked)
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from .clip import ClipSpec
from .errors import InputError
from .glimpse import hint_at
from .keypoints import points_of
from .npz import ArrayHeader, BadNpz, read_arrays, read_headers

SPLITS = ("train", "val", "test")
USUAL_CLASSES = ("nongesture", "gesture")  # in label order: gesture is 1, the positive class
SOURCE_PATTERN = r"^(?P<index>\d+)_(?P<source>.+)$"
HOME_PATTERN = re.compile(r"^(?P<name>.+?)_length_(?P<length_ms>\d+)(?:_sample_rate_(?P<sample_rate>\d+))?_iou_(?:thr_)?(?P<iou>\d*\.?\d+)$")
MOST_DIGITS = 18  # of a running number: longer ones do not fit into 64 bits and count nothing
HEADER_THREADS = 16  # reading headers waits for the file system, not for the CPU

KeypointsMode = Literal["required", "optional", "none"]


@dataclass(frozen=True)
class Snippet:
    """One source npz. `path` is relative to the home, with forward slashes; begin and end are in ms of the source."""

    path: str
    key: str
    split: str
    class_name: str
    label: int
    source: str
    index: int | None
    begin_ms: int | None
    end_ms: int | None
    file_bytes: int


@dataclass(frozen=True)
class Home:
    """What lies under a folder of snippets; `settings` is the home's parsed name, or None."""

    path: Path
    classes: tuple[str, ...]
    splits: dict[str, tuple[Snippet, ...]]
    settings: dict[str, str | int | float] | None


@dataclass(frozen=True)
class Content:
    """What one snippet holds, checked: video uint8 (T, H, W, 3), keypoints 0/1 (T, H, W) or None with its points (N, 3)."""

    video: np.ndarray
    keypoints: np.ndarray | None
    points: np.ndarray | None
    extras: dict[str, np.ndarray]
    frames_valid: int


@dataclass(frozen=True)
class ArrayNames:
    """Which arrays of a snippet are what."""

    video: str = "video"
    keypoints: str = "keypoints"
    keypoints_mode: KeypointsMode = "required"


@dataclass(frozen=True)
class Bad:
    """A snippet that cannot be used, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def find(home: Path, splits: Sequence[str] = (), classes: Sequence[str] = (), source_pattern: str = SOURCE_PATTERN) -> Home:
    """The snippets of each split, sorted by key; classes are the folder names found in any split.

    Raises InputError for a home that is missing or empty, an unknown class or split, and two snippets with one key.
    """
    if not home.is_dir():
        raise InputError(f"--dataset-home {home}: no such folder; expected {{train,val,test}}/CLASS/*.npz below it.")
    home = Path(os.path.abspath(home))  # so that `.` has its name, too
    paths = {split: {name: _npz_below(home / split / name) for name in _folders(home / split)} for split in SPLITS if (home / split).is_dir()}
    found = {name for folders in paths.values() for name, files in folders.items() if files}
    if not found:
        raise InputError(f"--dataset-home {home}: no snippets; expected {{train,val,test}}/CLASS/*.npz, found {_glimpse(home)}")
    present = [split for split, folders in paths.items() if any(folders.values())]
    if missing := [split for split in splits if split not in present]:
        raise InputError(f"--splits {' '.join(missing)}: no snippets in {home}, which has {' '.join(present)}.")
    order = class_order(found, classes)
    settings = parse_home_name(home.name)
    wanted = [split for split in present if split in splits] if splits else present
    length_ms = int(settings["length_ms"]) if settings else None
    by_split = {
        split: from_listing(
            [(f"{split}/{class_name}/{name}", size) for class_name, files in paths[split].items() for name, size in files], order, length_ms, source_pattern
        )
        for split in wanted
    }
    return Home(home, order, by_split, settings)


def class_order(found: Iterable[str], asked: Sequence[str] = ()) -> tuple[str, ...]:
    """Class names in label order: as asked, or nongesture before gesture, or sorted."""
    names = set(found)
    if asked:
        if unknown := sorted(names ^ set(asked)):
            raise InputError(f"--classes {' '.join(asked)}: expected exactly the class folders found, {' '.join(sorted(names))}; {' '.join(unknown)} differ.")
        if len(asked) != len(names):
            raise InputError(f"--classes {' '.join(asked)}: expected each class once.")
        return tuple(asked)
    return USUAL_CLASSES if names == set(USUAL_CLASSES) else tuple(sorted(names))


def parse_home_name(name: str) -> dict[str, str | int | float] | None:
    """`ellen_show_length_1300_sample_rate_1_iou_0.55` as its parts, length in ms; None for another name."""
    match = HOME_PATTERN.match(name)
    if match is None:
        return None
    parsed: dict[str, str | int | float] = {"name": match["name"], "length_ms": int(match["length_ms"]), "iou": float(match["iou"])}
    if match["sample_rate"]:
        parsed["sample_rate"] = int(match["sample_rate"])
    return parsed


def key_of(path: str) -> str:
    """The path from the home without its suffix; dots replaced, because tar readers split names at the first dot."""
    return path.removesuffix(".npz").replace(".", "_")


def unlabelled(file: Path) -> Snippet:
    """A snippet outside any home: its key is its path as given, without suffix; its label, -1, is unknown."""
    match = re.match(SOURCE_PATTERN, file.stem)
    source, index = (match["source"], int(match["index"])) if match else (file.stem, None)
    path = file.as_posix()
    return Snippet(path, path.removesuffix(".npz"), "", "", -1, source, index, None, None, file.stat().st_size)


def check_headers(home: Path, snippets: Sequence[Snippet], names: ArrayNames) -> tuple[ClipSpec, dict[str, int], list[Bad]]:
    """The geometry that most snippets have, further arrays with the bytes of the largest, and every snippet that cannot be packed.

    Reads only headers: about a millisecond a file.
    """
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        results = list(pool.map(lambda snippet: _headers_or_reason(home / snippet.path), snippets))
    shapes = Counter(r[names.video].shape for r in results if isinstance(r, dict) and names.video in r and _is_video(r[names.video]))
    if not shapes:
        first = next((Bad(s.path, r) for s, r in zip(snippets, results, strict=True) if isinstance(r, str)), None)
        found = next((", ".join(f"{k} {v}" for k, v in r.items()) for r in results if isinstance(r, dict)), None)
        raise InputError(
            f"{home}: none of {len(snippets)} snippets holds '{names.video}' as uint8 (T, H, W, 3); "
            + (f"the first holds {found or 'nothing'}. Name the array with --video-key." if found is not None else f"the first is bad: {first}")
        )
    readable = [r for r in results if isinstance(r, dict)]
    if names.keypoints_mode == "required" and not any(names.keypoints in r for r in readable):
        held = ", ".join(f"{name} {header}" for name, header in readable[0].items())
        advice = "Name the array with --keypoints-key, or pack without: --keypoints none."
        raise InputError(f"{home}: none of {len(snippets)} snippets holds '{names.keypoints}' as their mask of keypoints; the first holds {held}. {advice}")
    spec = ClipSpec(*shapes.most_common(1)[0][0][:3])
    extras: dict[str, int] = {}
    for name, header in (pair for r in readable for pair in r.items() if pair[0] not in (names.video, names.keypoints)):
        extras[name] = max(extras.get(name, 0), header.dtype.itemsize * math.prod(header.shape))
    bad = []
    for snippet, result in zip(snippets, results, strict=True):
        reason = result if isinstance(result, str) else _header_fault(result, spec, names)
        if reason:
            bad.append(Bad(snippet.path, reason))
    return spec, dict(sorted(extras.items())), bad


def read(path: Path, spec: ClipSpec | None, names: ArrayNames, extras: Sequence[str] = ()) -> Content:
    """One snippet with every value checked; raises BadNpz with the reason. A `spec` of None takes any geometry."""
    wanted = {names.video, *extras} | ({names.keypoints} if names.keypoints_mode != "none" else set())
    headers = read_headers(path)
    if reason := _header_fault(headers, spec, names):
        raise BadNpz(reason)
    arrays = read_arrays(path, wanted)
    mask = arrays.get(names.keypoints)
    try:
        points = None if mask is None else points_of(mask)
    except ValueError as error:
        raise BadNpz(f"array {names.keypoints}: {error}") from error
    video = arrays[names.video]
    return Content(video, mask, points, {name: arrays[name] for name in extras if name in arrays}, frames_valid(video))


def frames_valid(video: np.ndarray) -> int:
    """The frames before a zero-padded tail, at least 1: padding is never sampled."""
    for count in range(len(video), 0, -1):
        if video[count - 1].any():
            return count
    return len(video)  # a clip of zeros alone has no padding to tell from its content


def list_bad(bad: Sequence[Bad], total: int, what_to_do: str) -> InputError:
    """All bad files at once, one line each."""
    lines = "\n".join(f"  {one}" for one in bad)
    return InputError(f"{len(bad)} of {total} snippets cannot be used:\n{lines}\n{what_to_do}")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _npz_below(folder: Path) -> list[tuple[str, int]]:
    entries = [entry for entry in os.scandir(folder) if entry.name.endswith(".npz") and not entry.name.startswith(".")]
    return sorted((entry.name, _size(entry)) for entry in entries)


def _size(entry: os.DirEntry[str]) -> int:
    """0 for a link to nothing and the like: the check of its header then names it with all other bad files."""
    try:
        return entry.stat().st_size
    except OSError:
        return 0


def _glimpse(home: Path) -> str:
    names = sorted(entry.name for entry in os.scandir(home))
    inner = [name for name in names if any((home / name / split).is_dir() for split in SPLITS)]
    hint = f" Did you mean {home / inner[0]}?" if len(inner) == 1 else hint_at(home)
    return ((", ".join(names[:6]) + (", …" if len(names) > 6 else "")) or "an empty folder") + "." + hint


def from_listing(files: Iterable[tuple[str, int]], classes: Sequence[str], length_ms: int | None, source_pattern: str) -> tuple[Snippet, ...]:
    """The snippets of one split, sorted by key, from (path from the home, bytes) alone: no file is looked at."""
    pattern = _compiled(source_pattern)
    snippets = []
    for path, file_bytes in files:
        split, class_name, name = path.split("/")
        if not path.isprintable() or any("\udc80" <= c <= "\udcff" for c in path):
            raise InputError(f"{path!r} is not a printable UTF-8 name. Rename the file.")
        match = pattern.match(name.removesuffix(".npz"))
        groups = match.groupdict() if match else {}
        source, index = groups.get("source") or name.removesuffix(".npz"), groups.get("index")
        if index and not index.isdecimal():
            raise InputError(f"--source-pattern {source_pattern}: its group 'index' takes {index!r} from {path}; expected digits.")
        number = int(index) if index and len(index) <= MOST_DIGITS else None
        snippets.append(Snippet(path, key_of(path), split, class_name, classes.index(class_name), source, number, None, None, file_bytes))
    snippets.sort(key=lambda snippet: snippet.key.encode())
    for before, after in pairwise(snippets):
        if before.key == after.key:
            raise InputError(f"{before.path} and {after.path} would both be the clip '{before.key}'. Rename one of them.")
    return _with_times(snippets, length_ms)


def _compiled(source_pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(source_pattern)
    except re.error as error:
        raise InputError(f"--source-pattern {source_pattern}: not a regular expression ({error}).") from error


def _with_times(snippets: list[Snippet], length_ms: int | None) -> tuple[Snippet, ...]:
    """Begin and end in ms where a source's running numbers are gapless: its windows follow each other without overlap."""
    numbers: dict[str, list[int | None]] = {}
    for snippet in snippets:
        numbers.setdefault(snippet.source, []).append(snippet.index)
    starts: dict[str, int] = {}
    for source, found in numbers.items():
        known = [number for number in found if number is not None]
        if len(known) == len(found) == len(set(known)) == max(known) - min(known) + 1:
            starts[source] = min(known)
    if length_ms is None:
        return tuple(snippets)
    return tuple(
        replace(s, begin_ms=(s.index - starts[s.source]) * length_ms, end_ms=(s.index - starts[s.source] + 1) * length_ms)
        if s.source in starts and s.index is not None
        else s
        for s in snippets
    )


def _headers_or_reason(path: Path) -> dict[str, ArrayHeader] | str:
    try:
        return read_headers(path)
    except BadNpz as error:
        return str(error)


def _is_video(header: ArrayHeader) -> bool:
    return header.dtype == np.uint8 and len(header.shape) == 4 and header.shape[3] == 3 and min(header.shape) > 0


def _header_fault(headers: dict[str, ArrayHeader], spec: ClipSpec | None, names: ArrayNames) -> str | None:
    """Why a snippet with these headers cannot be used, or None."""
    for name, header in headers.items():
        if header.dtype.hasobject:
            return f"array '{name}' holds pickled objects, which are never loaded; save it as numbers"
    video, mask = headers.get(names.video), headers.get(names.keypoints)
    if video is None:
        return f"no array '{names.video}'; it holds {', '.join(headers) or 'nothing'} (--video-key names another)"
    if not _is_video(video):
        return f"array '{names.video}' is {video}; expected uint8 (T, H, W, 3)"
    if spec is not None and video.shape != spec.video_shape:
        return f"array '{names.video}' is {video}; the others are uint8 {spec.video_shape}"
    if names.keypoints_mode == "none":
        return None
    if mask is None:
        return None if names.keypoints_mode == "optional" else f"no array '{names.keypoints}'; it holds {', '.join(headers)} (--keypoints optional allows that)"
    if mask.dtype.kind not in "iub":
        return f"array '{names.keypoints}' is {mask}; expected an integer or bool mask"
    return None if mask.shape == video.shape[:3] else f"array '{names.keypoints}' is {mask}; expected {video.shape[:3]} as the video"
