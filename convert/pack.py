"""The whole conversion: find -> check all headers -> plan -> pack the missing shards in parallel -> manifest."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from clips import snippets as source
from clips.clip import ClipSpec
from clips.codecs import CODECS, make_codec
from clips.environment import allocated_cpus
from clips.errors import InputError
from clips.files import sha256_of, write_once
from clips.format import FormatError, ShardIndex, unpack_index
from clips.manifest import (
    Manifest,
    ShardEntry,
    SplitEntry,
    index_path,
    is_packed,
    read_manifest,
    tar_path,
    write_manifest,
)
from clips.npz import BadNpz
from clips.registry import check_name
from clips.snippets import SOURCE_PATTERN, ArrayNames, Bad, KeypointsMode, Snippet

from .encode import EncodedClip, Recipe, encode_clip
from .sharding import SplitPlan, clips_per_shard, differences, plan_split
from .writer import write_shard

logger = logging.getLogger(__name__)

CLIPS_IN_FLIGHT = 2  # per thread: one being written, one being read
MAX_BAD_LISTED = 1000  # a folder with more bad snippets than this is the wrong folder: stop early


@dataclass(frozen=True)
class PackConfig:
    """Packs npz snippets into sharded tar archives."""

    dataset_home: Path
    """The snippets: DIR/{train,val,test}/CLASS/*.npz."""
    output: Path
    """The folder of shards; a second run does only what is missing."""
    codec: str = "jpeg"
    """How frames are stored: jpeg (a tenth of the npz, about 40 dB) or zstd (bit-exact, nearly the size of the npz)."""
    quality: int = 90
    """JPEG's quality, 1 … 100."""
    level: int = 1
    """zstd's level, 1 … 22."""
    store_size: int | None = None
    """Store frames with this many pixels on their shorter side (jpeg only): a third less decode time at 256."""
    workers: int | None = None
    """Processes; default: the allocated CPUs, at most 8 outside a SLURM job."""
    shard_mib: float = 256
    """Aimed size of a shard in MiB."""
    keypoints: KeypointsMode = "required"
    """Whether each snippet must hold a mask of keypoints, may, or is packed without."""
    extras: Literal["ask", "keep", "drop"] = "ask"
    """Further arrays in the snippets: keep them bit-exact, drop them, or stop and ask."""
    video_key: str = "video"
    """The name of the array of frames."""
    keypoints_key: str = "keypoints"
    """The name of the array of masks."""
    splits: tuple[str, ...] = ()
    """Which of train, val and test; default: those that exist."""
    classes: tuple[str, ...] = ()
    """Class folders in label order; default: nongesture gesture, or sorted names."""
    source_pattern: str = SOURCE_PATTERN
    """Regular expression with groups index and source, matched against file names without suffix."""

    def __post_init__(self) -> None:
        check_name(CODECS, self.codec, "--codec")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers}: expected at least 1.")
        if not 0 < self.shard_mib < math.inf:
            raise InputError(f"--shard-mib {self.shard_mib}: expected a size above 0.")
        if self.store_size is not None and self.codec != "jpeg":
            raise InputError(f"--store-size {self.store_size} with --codec {self.codec}: smaller frames are not bit-exact. Take --codec jpeg or leave it out.")


def pack(config: PackConfig) -> Manifest:
    """The manifest of the packed folder. Raises InputError; then shards that are whole stay, and nothing else does."""
    if is_packed(config.dataset_home):
        raise InputError(f"--dataset-home {config.dataset_home}: holds shards already; expected npz snippets.")
    home = source.find(config.dataset_home, config.splits, config.classes, config.source_pattern)
    manifest, recipe = _settle(config, home)
    plans = _plans(config, home, manifest)
    _claim(config.output, manifest, plans)
    missing = [(plan, number) for plan in plans for number in range(len(plan.shards)) if not _is_whole(config.output, plan, number)]
    total = sum(len(plan.shards) for plan in plans)
    logger.info(f"packing {len(missing)} shards ({total - len(missing)} of {total} are already there)")
    bad = _pack_shards(config, home.path, recipe, missing)
    if bad:
        num_snippets = sum(map(len, home.splits.values()))
        folders = " and ".join(sorted({str(config.output / one.path.split("/")[0]) for one in bad}))
        raise source.list_bad(bad, num_snippets, f"Mend or move these files; with others it is another plan, so remove {folders}, then run the same command.")
    packed = {plan.split: _split_entry(config.output, plan, len(home.classes)) for plan in plans}
    earlier = read_manifest(config.output) if is_packed(config.output) else manifest
    manifest = replace(manifest, splits=earlier.splits | packed)
    if manifest != earlier:
        write_manifest(config.output, manifest)
    _report(home, manifest)
    return manifest


def _settle(config: PackConfig, home: source.Home) -> tuple[Manifest, Recipe]:
    """Every header read and every setting decided, before anything is written."""
    snippets = [snippet for split in home.splits.values() for snippet in split]
    names = ArrayNames(config.video_key, config.keypoints_key, config.keypoints)
    spec, extras, bad = source.check_headers(home.path, snippets, names)
    if bad:
        raise source.list_bad(bad, len(snippets), "Mend or move these files, then run the same command.")
    if extras and config.extras == "ask":
        raise InputError(f"{home.path}: snippets also hold {', '.join(extras)}. Say --extras keep (stored bit-exact) or --extras drop.")
    codec = make_codec(config.codec, {"quality": config.quality} if config.codec == "jpeg" else {"level": config.level})
    kept = extras if config.extras == "keep" else ()
    if clash := sorted(set(kept) & {"frames", "json", "cls", "keypoints"} | {name for name in kept if not name.isidentifier()}):
        raise InputError(f"{home.path}: arrays named {', '.join(clash)} cannot be members of a shard. Rename them, or say --extras drop.")
    stored = stored_spec(spec, config.store_size)
    if home.settings is None:
        logger.info(f"the home's name {home.path.name} does not tell length and sample rate: begin and end in ms stay unknown")
    arrays: dict[str, str | list[str]] = {
        "video": names.video,
        "keypoints": names.keypoints,
        "keypoints_mode": names.keypoints_mode,
        "kept": list(kept),
        "dropped": sorted(set(extras) - set(kept)),
    }
    where = {"folder": home.path.name, **(home.settings or {})}
    manifest = Manifest(codec.name, codec.settings(), spec, stored, home.classes, where, arrays, config.source_pattern)
    return manifest, Recipe(codec.name, codec.settings(), spec, stored, names, tuple(kept))


def stored_spec(source_spec: ClipSpec, store_size: int | None) -> ClipSpec:
    """The frames' geometry in the shards: the shorter side has `store_size` pixels."""
    if store_size is None:
        return source_spec
    shorter = min(source_spec.height, source_spec.width)
    if not 16 <= store_size < shorter:
        raise InputError(f"--store-size {store_size}: expected 16 … {shorter - 1} for frames of {source_spec.height}x{source_spec.width}.")
    return ClipSpec(source_spec.frames, round(source_spec.height * store_size / shorter), round(source_spec.width * store_size / shorter))


def _plans(config: PackConfig, home: source.Home, manifest: Manifest) -> list[SplitPlan]:
    codec = make_codec(manifest.codec, manifest.codec_settings)
    per_shard = clips_per_shard(codec, manifest.stored, config.shard_mib)
    settings = manifest.settings() | {"length_ms": manifest.home.get("length_ms")}
    return [plan_split(split, snippets, settings, per_shard) for split, snippets in home.splits.items()]


def _claim(output: Path, manifest: Manifest, plans: Sequence[SplitPlan]) -> None:
    """Makes each split's plan.json, exclusively; a folder in use by another plan is an InputError that says what differs."""
    for plan in plans:
        path = output / plan.split / "plan.json"
        if path.exists():
            _compare(output, plan, path)
    if is_packed(output) and (theirs := read_manifest(output)).settings() != manifest.settings():
        changed = [name for name, value in manifest.settings().items() if theirs.settings()[name] != value]
        raise InputError(f"--output {output}: its shards were packed with another {', '.join(changed)}. Take another folder or the same settings.")
    for plan in plans:
        folder = output / plan.split
        if (folder / "plan.json").exists():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_once(folder / "plan.json", json.dumps({"plan_id": plan.plan_id, "inputs": plan.inputs}, ensure_ascii=False).encode())
        except OSError as error:
            raise InputError(f"--output {output}: cannot be written ({error.strerror or error}). Take a folder that is writable and has space.") from error
        _compare(output, plan, folder / "plan.json")


def _compare(output: Path, plan: SplitPlan, path: Path) -> None:
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        same, differing = theirs["plan_id"] == plan.plan_id, differences(plan.inputs, theirs["inputs"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not readable as a plan ({error}). Take another --output, or remove {path.parent}.") from error
    if not same:
        found = "; ".join(differing) or "its plan id"
        raise InputError(f"--output {output}: {plan.split} is in use by another plan: {found}. Take another folder or the same settings.")


def _is_whole(output: Path, plan: SplitPlan, number: int) -> bool:
    index = _index_if_there(output, plan, number)
    tar = tar_path(output, plan.split, plan.shard_name(number))
    return index is not None and index.plan_id == plan.plan_id and tar.is_file() and tar.stat().st_size == index.tar_bytes


def _index_if_there(output: Path, plan: SplitPlan, number: int) -> ShardIndex | None:
    try:
        return unpack_index(index_path(output, plan.split, plan.shard_name(number)).read_bytes())
    except (OSError, FormatError):
        return None


def _pack_shards(config: PackConfig, home: Path, recipe: Recipe, jobs: Sequence[tuple[SplitPlan, int]]) -> list[Bad]:
    """Packs in `--workers` processes and returns the bad snippets; processes left over become threads inside a shard."""
    if not jobs:
        return []
    workers = config.workers or allocated_cpus()
    processes = min(workers, len(jobs))
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    total = sum(len(plan.shards[number]) for plan, number in jobs)
    bad: list[Bad] = []
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(counter,))
    progress = tqdm(total=total, unit="clips", desc="pack", smoothing=0.05)
    try:
        with executor, progress:
            pending = {
                executor.submit(_pack_shard, home, config.output, p.split, p.shard_name(n), p.plan_id, p.shards[n], recipe, -(-workers // processes))
                for p, n in jobs
            }
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.5)
                    progress.update(counter.value - progress.n)
                    bad += [one for future in done for one in future.result()]
                    if len(bad) > MAX_BAD_LISTED:
                        break
            finally:
                for future in pending:
                    future.cancel()
    except BrokenProcessPool as error:
        raise InputError("a worker was killed, probably for want of memory. Run the same command with fewer --workers; whole shards are kept.") from error
    return sorted(bad, key=lambda one: one.path)


_counter: Synchronized[int]  # clips done by all workers; set in each worker's start


def _start_worker(counter: Synchronized[int]) -> None:
    global _counter
    _counter = counter


def _pack_shard(
    home: Path, output: Path, split: str, name: str, plan_id: str, snippets: Sequence[Snippet], recipe: Recipe, threads: int
) -> list[Bad]:
    """Writes one shard, in a worker; a shard with bad snippets is not written and they are returned."""
    bad: list[Bad] = []
    try:
        with ThreadPoolExecutor(threads) as pool:
            write_shard(output, split, name, plan_id, _encoded(pool, threads, home, snippets, recipe, bad))
    except _HasBad:
        return bad
    except OSError as error:
        raise InputError(f"{output / split / name}: cannot be written ({error.strerror or error}). Make space, then run the same command.") from error
    return []


class _HasBad(Exception):
    """The shard holds bad snippets; all of them have been looked at."""


def _encoded(pool: ThreadPoolExecutor, threads: int, home: Path, snippets: Sequence[Snippet], recipe: Recipe, bad: list[Bad]) -> Iterator[EncodedClip]:
    """The clips in order, encoded a few ahead; raises _HasBad at the end where `bad` was filled."""
    codec = recipe.make_codec()
    ahead: deque[tuple[Snippet, Future[EncodedClip]]] = deque()
    waiting = iter(snippets)
    while True:
        while len(ahead) < CLIPS_IN_FLIGHT * threads - 1 and (snippet := next(waiting, None)) is not None:
            ahead.append((snippet, pool.submit(encode_clip, home, snippet, recipe, codec)))
        if not ahead:
            break
        snippet, future = ahead.popleft()
        try:
            clip = future.result()
        except BadNpz as error:
            bad.append(Bad(snippet.path, str(error)))
            clip = None
        with _counter.get_lock():
            _counter.value += 1
        if clip is not None and not bad:
            yield clip
    if bad:
        raise _HasBad


def _split_entry(output: Path, plan: SplitPlan, num_classes: int) -> SplitEntry:
    shards = []
    for number in range(len(plan.shards)):
        name = plan.shard_name(number)
        index = _index_if_there(output, plan, number)
        if index is None:
            raise InputError(f"{output / plan.split / name}: vanished while packing. Run the same command again.")
        per_class = np.bincount([entry.facts.label for entry in index.clips], minlength=num_classes)
        digest = sha256_of(index_path(output, plan.split, name))
        shards.append(ShardEntry(name, len(index.clips), index.tar_bytes, index.tar_sha256, digest, tuple(map(int, per_class))))
    return SplitEntry(plan.plan_id, tuple(shards))


def _report(home: source.Home, manifest: Manifest) -> None:
    for split, snippets in home.splits.items():
        entry = manifest.splits[split]
        before, after = sum(s.file_bytes for s in snippets), sum(s.tar_bytes for s in entry.shards)
        per_class = np.sum([shard.clips_per_class for shard in entry.shards], axis=0)
        classes = ", ".join(f"{count} {name}" for count, name in zip(per_class, manifest.classes, strict=True))
        logger.info(f"{split}: {entry.num_clips} clips ({classes}) in {len(entry.shards)} shards, {before / 1e6:.1f} MB npz -> {after / 1e6:.1f} MB")
        if lacking := [name for count, name in zip(per_class, manifest.classes, strict=True) if not count]:
            logger.info(f"{split}: holds no clip of {', '.join(lacking)}")
