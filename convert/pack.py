"""The whole conversion: find -> check all headers -> plan -> pack the missing shards of a share in parallel -> join."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clips import snippets as source
from clips.claim import claimed
from clips.clip import ClipSpec
from clips.codecs import CODECS, make_codec
from clips.environment import Array, allocated_cpus, job_array
from clips.errors import InputError
from clips.files import write_once
from clips.manifest import Manifest, is_packed, read_manifest
from clips.npz import BadNpz
from clips.registry import check_name
from clips.snippets import SOURCE_PATTERN, ArrayNames, KeypointsMode, Snippet
from clips.words import counted

from .encode import Recipe
from .merge import PLAN, check_budget, claim_path, indexes, join, read_plan_file, remove_leftovers, whole
from .sharding import SplitPlan, clips_per_shard, differences, plan_split, with_mended
from .work import changed, pack_shards

logger = logging.getLogger(__name__)

MAX_BAD_LISTED = 1000  # beyond the budget: a folder with more bad snippets than this is the wrong folder, stop early


@dataclass(frozen=True)
class PackConfig:
    """Packs npz snippets into sharded tar archives."""

    dataset_home: Path
    """The snippets: DIR/{train,val,test}/CLASS/*.npz."""
    output: Path
    """The folder of shards; a second run does only what is missing."""
    codec: str = "jpeg"
    """How frames are stored: jpeg (an eighth of the npz, about 42 dB) or zstd (bit-exact, a sixth larger than the npz)."""
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
    max_bad_clips: int = 0
    """Bad snippets that may be left out, over all splits and shares; each is named in bad.jsonl and in the manifest."""
    task: int | None = None
    """Pack only this share, 0 … tasks − 1; default: SLURM_ARRAY_TASK_ID in a job array."""
    tasks: int | None = None
    """The number of shares; default: the job array's, where its elements are 0 … count − 1. `merge` joins them."""
    verify: bool = False
    """Then check every shard against its npz, as python -m convert verify --dataset-home does; not for a share of several."""
    near_duplicates: bool = False
    """Also look for clips of different splits that look nearly alike."""

    def __post_init__(self) -> None:
        check_name(CODECS, self.codec, "--codec")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers}: expected at least 1.")
        if not 0 < self.shard_mib < math.inf:
            raise InputError(f"--shard-mib {self.shard_mib}: expected a size above 0.")
        if self.max_bad_clips < 0:
            raise InputError(f"--max-bad-clips {self.max_bad_clips}: expected 0 or more.")
        if self.tasks is not None and self.tasks < 1:
            raise InputError(f"--tasks {self.tasks}: expected at least 1.")
        if self.store_size is not None and self.codec != "jpeg":
            raise InputError(f"--store-size {self.store_size} with --codec {self.codec}: smaller frames are not bit-exact. Take --codec jpeg or leave it out.")


def pack(config: PackConfig) -> Manifest | None:
    """The manifest of the packed folder; None for one share of several, which `merge` joins.

    Raises InputError; then shards that are whole stay, and nothing else does.
    """
    if config.output.resolve() == config.dataset_home.resolve():
        raise InputError(f"--output {config.output}: is the folder of the snippets. Name another one for the shards.")
    if is_packed(config.dataset_home):
        raise InputError(f"--dataset-home {config.dataset_home}: holds shards already; expected npz snippets.")
    task, tasks = share(config)
    if tasks > 1 and config.verify:
        raise InputError("--verify: one share of several cannot be verified. Leave it out; when all are packed: python -m convert merge, then verify.")
    home = source.find(config.dataset_home, config.splits, config.classes, config.source_pattern)
    manifest, recipe, extra_bytes = _settle(config, home)
    per_shard = clips_per_shard(make_codec(manifest.codec, manifest.codec_settings), manifest.stored, extra_bytes, config.shard_mib)
    plans = [plan_split(split, snippets, manifest.settings(), per_shard) for split, snippets in home.splits.items()]
    plans = _claim_folder(config.output, manifest, plans)
    jobs = [(plan, number) for plan in plans for number in range(len(plan.shards))]
    mine = [job for place, job in enumerate(jobs) if place % tasks == task]
    try:
        claim = claim_path(config.output, task, tasks, tuple(home.splits))
        with claimed(claim):
            remove_leftovers(config.output, mine, claim)
            missing = [job for job in mine if not _is_done(config.output, home.path, recipe, *job)]
            named = f"share {task} of {tasks}: " if tasks > 1 else ""
            logger.info(f"{named}packing {counted(len(missing), 'shard')} ({len(mine) - len(missing)} of {len(mine)} are already there)")
            workers = config.workers or allocated_cpus()
            pack_shards(home.path, config.output, recipe, missing, workers, config.max_bad_clips + MAX_BAD_LISTED)
        check_budget(config.output, plans, config.max_bad_clips)
        if tasks > 1:
            logger.info(f"share {task} of {tasks} is packed; when all are: python -m convert merge {config.output}")
            return None
        return join(config.output, plans, config.near_duplicates)
    except OSError as error:
        raise InputError(f"--output {config.output}: {error.strerror or error}. Look after the folder, then run the same command.") from error


def share(config: PackConfig, environ: Array | None = None) -> tuple[int, int]:
    """This run's share and the number of shares: as asked, or the job array's when its elements are 0 … count − 1."""
    array = environ if environ is not None else job_array()
    tasks = config.tasks
    if tasks is None and array is not None and (array.lowest, array.highest) == (0, array.count - 1):
        tasks = array.count
    if tasks is None and array is not None and config.task is None:
        raise InputError(
            f"--tasks: missing; this job array has {array.count} elements, {array.lowest} … {array.highest}, so the number of shares cannot be told from it. "
            "Give --tasks of the first array, so that the shares stay the same."
        )
    if tasks is None and config.task is not None:
        raise InputError(f"--tasks: missing; --task {config.task} is one share of how many?")
    tasks = tasks or 1
    task = config.task if config.task is not None else array.element if array is not None else None
    if task is None and tasks > 1:
        raise InputError(f"--task: missing; expected 0 … {tasks - 1}, the share of --tasks {tasks} that this run packs.")
    if not 0 <= (task or 0) < tasks:
        raise InputError(f"--task {task}: expected 0 … {tasks - 1} for --tasks {tasks}.")
    return task or 0, tasks


def _settle(config: PackConfig, home: source.Home) -> tuple[Manifest, Recipe, int]:
    """Every header read and every setting decided, before anything is written; with them the bytes of kept arrays of a clip."""
    snippets = [snippet for split in home.splits.values() for snippet in split]
    names = ArrayNames(config.video_key, config.keypoints_key, config.keypoints)
    spec, extras, bad = source.check_headers(home.path, snippets, names)
    if len(bad) > config.max_bad_clips:
        raise source.list_bad(bad, len(snippets), f"Mend or move these files, or allow them with --max-bad-clips {len(bad)}, then run the same command.")
    if extras and config.extras == "ask":
        raise InputError(f"{home.path}: snippets also hold {', '.join(extras)}. Say --extras keep (stored bit-exact) or --extras drop.")
    codec = make_codec(config.codec, {"quality": config.quality} if config.codec == "jpeg" else {"level": config.level})
    kept = tuple(extras) if config.extras == "keep" else ()
    if clash := sorted(set(kept) & {"frames", "json", "cls", "keypoints"} | {name for name in kept if not name.isidentifier()}):
        raise InputError(f"{home.path}: arrays named {', '.join(clash)} cannot be members of a shard. Rename them, or say --extras drop.")
    stored = stored_spec(spec, config.store_size)
    if unmatched := sum(snippet.index is None for snippet in snippets):
        logger.info(f"{unmatched} of {len(snippets)} file names do not match --source-pattern {config.source_pattern}: each counts as a source of its own")
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
    return manifest, Recipe(codec.name, codec.settings(), spec, stored, names, kept), sum(extras[name] for name in kept)


def stored_spec(source_spec: ClipSpec, store_size: int | None) -> ClipSpec:
    """The frames' geometry in the shards: the shorter side has `store_size` pixels."""
    if store_size is None:
        return source_spec
    shorter = min(source_spec.height, source_spec.width)
    if not 16 <= store_size < shorter:
        raise InputError(f"--store-size {store_size}: expected 16 … {shorter - 1} for frames of {source_spec.height}x{source_spec.width}.")
    return ClipSpec(source_spec.frames, round(source_spec.height * store_size / shorter), round(source_spec.width * store_size / shorter))


def _claim_folder(output: Path, manifest: Manifest, plans: Sequence[SplitPlan]) -> list[SplitPlan]:
    """Makes each split's plan.json, exclusively; a folder in use by another plan is an InputError that says what differs."""
    if is_packed(output) and (theirs := read_manifest(output)).settings() != manifest.settings():
        found = "; ".join(differences(manifest.settings() | {"files": []}, theirs.settings() | {"files": []}))
        raise InputError(f"--output {output}: its shards were packed with other settings: {found}. Take another folder or the same settings.")
    for plan in plans:  # all are compared before any is made
        if (output / plan.split / PLAN).exists():
            _theirs(output, plan)
    for plan in plans:
        path = output / plan.split / PLAN
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                made = {"plan_id": plan.plan_id, "inputs": plan.inputs, "folder": manifest.home["folder"]}
                write_once(path, json.dumps(made, ensure_ascii=False).encode())
        except OSError as error:
            raise InputError(f"--output {output}: cannot be written ({error.strerror or error}). Take a folder that is writable and has space.") from error
    return [_theirs(output, plan) for plan in plans]


def _theirs(output: Path, plan: SplitPlan) -> SplitPlan:
    """The plan that holds the folder: mine, or one that differs in mended files alone."""
    theirs = read_plan_file(output, plan.split)
    if theirs.plan_id == plan.plan_id:
        return plan
    there = indexes(output, theirs).values()
    sizes = {one["path"]: one["bytes"] for index in there for one in index.mended}
    mended = with_mended(theirs, plan, {one["path"] for index in there for one in index.bad}, sizes)
    if mended is None:
        found = "; ".join(differences(plan.inputs, theirs.inputs)) or "its plan id"
        raise InputError(f"--output {output}: {plan.split} is in use by another plan: {found}. Take another folder or the same settings.")
    return mended


def _is_done(output: Path, home: Path, recipe: Recipe, plan: SplitPlan, number: int) -> bool:
    """Whether the shard is whole, and its bad snippets, if any, are bad still."""
    index = whole(output, plan, number)
    if index is None:
        return False
    left_out = {one["path"] for one in index.bad}
    return all(_is_bad(home, snippet, recipe) for snippet in plan.shards[number] if snippet.path in left_out)


def _is_bad(home: Path, snippet: Snippet, recipe: Recipe) -> bool:
    try:
        source.read(home / snippet.path, recipe.source, recipe.names, recipe.extras)
    except BadNpz:
        return True
    return changed(home, snippet) is not None
