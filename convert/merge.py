"""Packed shares to one folder: every planned shard is there, whole and of this plan -> leaks -> manifest."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from clips.claim import STALE_S, age_s, claimed, is_held, started
from clips.clip import ClipSpec
from clips.environment import allocated_cpus
from clips.errors import InputError
from clips.files import sha256_of, write_whole
from clips.format import ClipFacts, FormatError, ShardIndex, unpack_index
from clips.manifest import MANIFEST, Leaks, Manifest, ShardEntry, SplitEntry, index_path, is_packed, read_manifest, tar_path, to_json, write_manifest
from clips.snippets import SPLITS, Bad, Snippet, list_bad
from clips.words import counted

from . import leaks
from .sharding import SplitPlan, read_plan
from .still import is_still, still_in_words

logger = logging.getLogger(__name__)

PLAN = "plan.json"
BAD = "bad.jsonl"
REMEDY = "mend the file, or allow it with --max-bad-clips, then run the same pack again: only its shard is packed anew"
TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<host>[^.]+(?:\.[^.]+)*)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp$")


@dataclass(frozen=True)
class MergeConfig:
    """Joins the shares of several pack runs into one folder: checks every shard and writes the manifest."""

    output: tyro.conf.Positional[Path]
    """The folder that the pack runs filled."""
    max_bad_clips: int = 0
    """Bad snippets that may be left out, over all splits."""
    near_duplicates: bool = False
    """Also look for clips of different splits that look nearly alike."""


def merge(config: MergeConfig) -> Manifest:
    """The manifest. InputError for a gap, a damaged shard, a stranger's shard, and more bad snippets than allowed."""
    try:
        return _merge(config)
    except OSError as error:
        raise InputError(f"{config.output}: {error.strerror or error}. Look after the folder, then run the same command.") from error


def _merge(config: MergeConfig) -> Manifest:
    splits = [split for split in SPLITS if (config.output / split / PLAN).is_file()]
    if not splits:
        raise InputError(f"{config.output}: no {PLAN} below it; expected a folder that python -m convert pack filled.")
    plans = [read_plan_file(config.output, split) for split in splits]
    if len({json.dumps(plan.inputs["settings"], sort_keys=True) for plan in plans}) > 1:
        raise InputError(f"{config.output}: {' and '.join(splits)} were packed with different settings. Pack one of them again into another folder.")
    problems = [problem for plan in plans for problem in [*_gaps(config.output, plan), *strangers(config.output, plan)]]
    problems += [
        f"{config.output / split}: holds shards without {PLAN}. Restore it, or remove this folder."
        for split in SPLITS
        if split not in splits and list((config.output / split).glob("[!.]*.tar"))
    ]
    if problems:
        raise InputError(f"{config.output}: not whole:\n" + "\n".join(f"  {problem}" for problem in problems))
    check_budget(config.output, plans, config.max_bad_clips)
    return join(config.output, plans, config.near_duplicates)


def join(output: Path, plans: Sequence[SplitPlan], near_duplicates: bool) -> Manifest:
    """Writes the manifest over these plans' shards, which must be whole, and those that it names already."""
    with claimed(output / ".manifest.claim"):
        earlier = read_manifest(output) if is_packed(output) else None
        others = [read_plan_file(output, split) for split in (earlier.splits if earlier else ()) if split not in {plan.split for plan in plans}]
        every = sorted([*plans, *others], key=lambda plan: SPLITS.index(plan.split))
        found = {plan.split: indexes(output, plan) for plan in every}
        entries = {split: [entry for index in of_split.values() for entry in index.clips] for split, of_split in found.items()}
        asked = near_duplicates or (earlier is not None and earlier.leaks.near is not None)
        near = leaks.near(entries) if asked else None
        manifest = manifest_of(output, every, found, Leaks(leaks.identical(entries), leaks.shared_sources(entries), near))
        if earlier is None or to_json(manifest) != to_json(earlier):
            write_manifest(output, manifest)
    _report(manifest, found)
    return manifest


def read_plan_file(output: Path, split: str) -> SplitPlan:
    path = output / split / PLAN
    try:
        return read_plan(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not readable as a plan ({error}). Take another --output, or remove {path.parent}.") from error


def indexes(output: Path, plan: SplitPlan) -> dict[int, ShardIndex]:
    """The indexes of the plan's shards that are there, by number."""
    found = {}
    for number in range(len(plan.shards)):
        try:
            index = unpack_index(index_path(output, plan.split, plan.shard_name(number)).read_bytes())
        except (OSError, FormatError):
            continue
        if index.plan_id == plan.plan_id:
            found[number] = index
    return found


def whole(output: Path, plan: SplitPlan, number: int) -> ShardIndex | None:
    """The shard's index, when it holds what was planned and its tar has the size that it tells; None otherwise."""
    name = plan.shard_name(number)
    try:
        index = unpack_index(index_path(output, plan.split, name).read_bytes())
        tar_bytes = tar_path(output, plan.split, name).stat().st_size
    except (OSError, FormatError):
        return None
    return None if tar_bytes != index.tar_bytes or index_fault(plan, number, index) else index


def index_fault(plan: SplitPlan, number: int, index: ShardIndex) -> str | None:
    """Why the index is not that of the planned shard, or None."""
    if (index.plan_id, index.shard) != (plan.plan_id, plan.shard_name(number)):
        return f"is of shard {index.shard} of another plan" if index.plan_id != plan.plan_id else f"is of shard {index.shard}"
    left_out = {one["path"] for one in index.bad}
    expected = [_planned(snippet) for snippet in plan.shards[number] if snippet.path not in left_out]
    return None if [_planned(entry.facts) for entry in index.clips] == expected else "holds other clips than the plan says"


def _planned(clip: Snippet | ClipFacts) -> tuple[str | int | None, ...]:
    """What is known of a clip before it is read."""
    return clip.key, clip.label, clip.source, clip.index, clip.begin_ms, clip.end_ms


def check_budget(output: Path, plans: Sequence[SplitPlan], max_bad_clips: int) -> None:
    """Writes bad.jsonl over these and all other splits of the folder; InputError when more snippets are bad than allowed."""
    there = [split for split in SPLITS if (output / split / PLAN).is_file() and split not in {plan.split for plan in plans}]
    plans = [*plans, *(read_plan_file(output, split) for split in there)]
    bad = [
        {"path": one["path"], "split": plan.split, "shard": index.shard, "reason": one["reason"], "remedy": REMEDY}
        for plan in plans
        for index in indexes(output, plan).values()
        for one in index.bad
    ]
    bad.sort(key=lambda one: one["path"])
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in bad).encode()
    path = output / BAD
    if bad and (not path.exists() or path.read_bytes() != text):
        write_whole(path, text)
    elif not bad:
        path.unlink(missing_ok=True)
    if len(bad) > max_bad_clips:
        total = sum(len(shard) for plan in plans for shard in plan.shards)
        advice = f"Mend these files, or allow them with --max-bad-clips {len(bad)}, then run the same command: only their shards are packed again."
        raise list_bad([Bad(one["path"], one["reason"]) for one in bad], total, advice)


def remove_leftovers(output: Path, shards: Sequence[tuple[SplitPlan, int]], claim: Path) -> None:
    """Removes what killed runs left: claims that nobody holds, temporary files whose process has ended, those of `shards`, which

    this run's `claim` makes its own unless a run with other shares is at work, and small ones that nobody touched for a minute.
    """
    others = [other for other in output.glob(".share-*.claim") if other != claim]
    held = [other for other in others if is_held(other)]
    for other in set(others) - set(held):
        other.unlink(missing_ok=True)
    alone = all(_shares(other) == _shares(claim) for other in held)
    mine = {f"{plan.shard_name(number)}{suffix}" for plan, number in shards if alone for suffix in (".tar", ".index.mp")}
    for folder in {output, *(output / plan.split for plan, _ in shards)}:
        for path in folder.glob(".*.tmp"):
            match = TEMPORARY.match(path.name)
            if match is None:
                continue
            of_shard = match["name"].endswith((".tar", ".index.mp"))
            dead = match["host"] == socket.gethostname() and started(int(match["pid"])) is None
            with suppress(FileNotFoundError):  # its process gave it its name meanwhile
                if dead or match["name"] in mine or (not of_shard and age_s(path) > STALE_S):
                    path.unlink()


def claim_path(output: Path, task: int, tasks: int, splits: Sequence[str]) -> Path:
    """Of a share: runs with other numbers of shares, or over other splits, deal the shards in another way."""
    return output / f".share-{task}-of-{tasks}-{'-'.join(splits)}.claim"


def _shares(claim: Path) -> str:
    return claim.name.partition("-of-")[2]


def _gaps(output: Path, plan: SplitPlan) -> list[str]:
    """What is wrong with the plan's shards, their tars read and hashed."""

    def look(number: int) -> str | None:
        name = plan.shard_name(number)
        tar, path = tar_path(output, plan.split, name), index_path(output, plan.split, name)
        try:
            index = unpack_index(path.read_bytes())
            fault = index_fault(plan, number, index)
            if fault:
                return f"{path}: {fault}. Remove it and {tar.name}, then pack its share again."
            if sha256_of(tar) != index.tar_sha256:
                return f"{tar}: is not the tar that its index tells of. Remove both, then pack its share again."
        except FileNotFoundError as error:
            return f"{error.filename}: missing. Pack its share again (python -m convert pack with the same --task and --tasks)."
        except (OSError, FormatError) as error:
            return f"{path}: {error}. Remove it, then pack its share again."
        return None

    with ThreadPoolExecutor(allocated_cpus()) as pool:
        return [problem for problem in pool.map(look, range(len(plan.shards))) if problem]


def strangers(output: Path, plan: SplitPlan) -> list[str]:
    """Files among the shards that are none of the plan's."""
    known = {f"{plan.shard_name(number)}{suffix}" for number in range(len(plan.shards)) for suffix in (".tar", ".index.mp")}
    names = sorted(path.name for path in (output / plan.split).iterdir() if path.name.endswith((".tar", ".index.mp")) and not path.name.startswith("."))
    return [f"{output / plan.split / name}: no shard of this plan. Remove it." for name in names if name not in known]


def manifest_of(output: Path, plans: Sequence[SplitPlan], found: dict[str, dict[int, ShardIndex]], leaked: Leaks) -> Manifest:
    """What these plans, in the order of splits, and their shards' indexes say; InputError for a missing index."""
    settings = plans[0].inputs["settings"]
    path = output / plans[0].split / PLAN
    folder = json.loads(path.read_text(encoding="utf-8")).get("folder")
    if not isinstance(folder, str):
        raise InputError(f"{path}: does not tell the home's folder. Restore it, or take another --output.")
    return Manifest(
        codec=settings["codec"],
        codec_settings=settings["codec_settings"],
        source=ClipSpec(**settings["source"]),
        stored=ClipSpec(**settings["stored"]),
        classes=tuple(settings["classes"]),
        home={"folder": folder, **settings["home"]},
        arrays=settings["arrays"],
        source_pattern=settings["source_pattern"],
        leaks=leaked,
        splits={plan.split: _split_entry(output, plan, found[plan.split]) for plan in plans},
    )


def _split_entry(output: Path, plan: SplitPlan, found: dict[int, ShardIndex]) -> SplitEntry:
    shards = []
    for number in range(len(plan.shards)):
        name = plan.shard_name(number)
        if number not in found:
            raise InputError(f"{index_path(output, plan.split, name)}: vanished. Run the same pack again.")
        index = found[number]
        per_class = np.bincount([entry.facts.label for entry in index.clips], minlength=len(plan.inputs["settings"]["classes"]))
        digest = sha256_of(index_path(output, plan.split, name))
        shards.append(ShardEntry(name, len(index.clips), index.tar_bytes, index.tar_sha256, digest, tuple(map(int, per_class))))
    return SplitEntry(plan.plan_id, tuple(shards), tuple(one for index in found.values() for one in index.bad))


def _report(manifest: Manifest, found: dict[str, dict[int, ShardIndex]]) -> None:
    for split, entry in manifest.splits.items():
        per_class = np.sum([shard.clips_per_class for shard in entry.shards], axis=0)
        classes = ", ".join(f"{count} {name}" for count, name in zip(per_class, manifest.classes, strict=True))
        size = sum(shard.tar_bytes for shard in entry.shards) / 1e6
        logger.info(f"{split}: {counted(entry.num_clips, 'clip')} ({classes}) in {counted(len(entry.shards), 'shard')}, {size:.1f} MB")
        if lacking := [name for count, name in zip(per_class, manifest.classes, strict=True) if not count]:
            logger.info(f"{split}: holds no clip of {', '.join(lacking)}")
        clips = [clip for index in found[split].values() for clip in index.clips]
        padded = sum(clip.facts.frames_valid < manifest.source.frames for clip in clips)
        constant = [clip for clip in clips if clip.frames_constant]
        if entry.bad:
            logger.warning(f"{split}: {counted(len(entry.bad), 'bad snippet')} left out, see {BAD}")
        if padded:
            logger.info(f"{split}: {counted(padded, 'clip')} with zero frames at the end, which are not sampled")
        if constant:
            logger.warning(f"{split}: {counted(len(constant), 'clip')} with frames of a single colour, '{constant[0].facts.key}' first")
        if still := sorted(clip.facts.key for clip in clips if is_still(clip)):
            logger.warning(f"{split}: {still_in_words(still)}")
    _report_leaks(manifest.leaks)


def _report_leaks(leaked: Leaks) -> None:
    if leaked.identical:
        first = " and ".join(leaked.identical[0])
        logger.warning(f"leak: {counted(len(leaked.identical), 'clip')} in several splits with equal bytes, {first} first; see {MANIFEST}")
    if leaked.sources:
        name, splits = next(iter(leaked.sources.items()))
        logger.warning(f"leak: {counted(len(leaked.sources), 'source')} in several splits, '{name}' in {' and '.join(splits)} first; see {MANIFEST}")
    if leaked.near:
        first = " and ".join(leaked.near[0])
        logger.warning(f"leak: {counted(len(leaked.near), 'pair')} of clips of different splits that look nearly alike, {first} first; see {MANIFEST}")
