"""Packed shares to one folder: every planned shard is there, whole and of this plan -> leaks -> manifest."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from clips.clip import ClipSpec
from clips.environment import allocated_cpus
from clips.errors import InputError
from clips.files import sha256_of, write_whole
from clips.format import FormatError, ShardIndex, unpack_index
from clips.manifest import MANIFEST, Leaks, Manifest, ShardEntry, SplitEntry, index_path, is_packed, read_manifest, tar_path, to_json, write_manifest
from clips.snippets import SPLITS, Bad, list_bad

from . import leaks
from .claim import STALE_S, claimed, started
from .sharding import SplitPlan, read_plan

logger = logging.getLogger(__name__)

PLAN = "plan.json"
BAD = "bad.jsonl"
REMEDY = "mend or move the file, then run the same pack again: only its shard is packed anew"
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
    splits = [split for split in SPLITS if (config.output / split / PLAN).is_file()]
    if not splits:
        raise InputError(f"{config.output}: no {PLAN} below it; expected a folder that python -m convert pack filled.")
    plans = [read_plan_file(config.output, split) for split in splits]
    if len({json.dumps(plan.inputs["settings"], sort_keys=True) for plan in plans}) > 1:
        raise InputError(f"{config.output}: {' and '.join(splits)} were packed with different settings. Pack one of them again into another folder.")
    problems = [problem for plan in plans for problem in [*_gaps(config.output, plan), *strangers(config.output, plan)]]
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
        near = leaks.near(entries) if near_duplicates else earlier.leaks.near if earlier else None
        manifest = _manifest(output, every, found, Leaks(leaks.identical(entries), leaks.shared_sources(entries), near))
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
    expected = [(snippet.key, snippet.label) for snippet in plan.shards[number] if snippet.path not in left_out]
    found = [(entry.facts.key, entry.facts.label) for entry in index.clips]
    return None if found == expected else "holds other clips than the plan says"


def check_budget(output: Path, plans: Sequence[SplitPlan], max_bad_clips: int) -> None:
    """Writes bad.jsonl; InputError when more snippets are bad than allowed."""
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
        advice = f"Mend or move these files, or allow them with --max-bad-clips {len(bad)}, then run the same command: only their shards are packed again."
        raise list_bad([Bad(one["path"], one["reason"]) for one in bad], total, advice)


def remove_leftovers(output: Path, shards: Sequence[tuple[SplitPlan, int]]) -> None:
    """Temporary files of killed runs: those of these shards, which are ours alone now, and small ones whose process has ended."""
    mine = {f"{plan.shard_name(number)}{suffix}" for plan, number in shards for suffix in (".tar", ".index.mp")}
    for folder in {output, *(output / plan.split for plan, _ in shards)}:
        for path in folder.glob(".*.tmp"):
            match = TEMPORARY.match(path.name)
            if match is None:
                continue
            of_shard = match["name"].endswith((".tar", ".index.mp"))
            dead = match["host"] == socket.gethostname() and started(int(match["pid"])) is None
            if match["name"] in mine or (not of_shard and (dead or _age_s(path) > STALE_S)):
                path.unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    probe = path.with_name(f"{path.name}.{os.getpid()}.age")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


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


def _manifest(output: Path, plans: Sequence[SplitPlan], found: dict[str, dict[int, ShardIndex]], leaked: Leaks) -> Manifest:
    settings = plans[0].inputs["settings"]
    folder = json.loads((output / plans[0].split / PLAN).read_text(encoding="utf-8"))["folder"]
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
        logger.info(f"{split}: {entry.num_clips} clips ({classes}) in {len(entry.shards)} shards, {size:.1f} MB")
        if lacking := [name for count, name in zip(per_class, manifest.classes, strict=True) if not count]:
            logger.info(f"{split}: holds no clip of {', '.join(lacking)}")
        clips = [clip for index in found[split].values() for clip in index.clips]
        padded = sum(clip.facts.frames_valid < manifest.source.frames for clip in clips)
        constant = [clip for clip in clips if clip.frames_constant]
        if entry.bad:
            logger.warning(f"{split}: {len(entry.bad)} bad snippets were left out, see {BAD}")
        if padded:
            logger.info(f"{split}: {padded} clips end in zero frames, which are not sampled")
        if constant:
            logger.warning(f"{split}: {len(constant)} clips hold frames of a single colour, '{constant[0].facts.key}' first")
    _report_leaks(manifest.leaks)


def _report_leaks(leaked: Leaks) -> None:
    if leaked.identical:
        logger.warning(f"leak: {len(leaked.identical)} clips lie in several splits with equal bytes, {' and '.join(leaked.identical[0])} first; see {MANIFEST}")
    if leaked.sources:
        name, splits = next(iter(leaked.sources.items()))
        logger.warning(f"leak: {len(leaked.sources)} sources lie in several splits, '{name}' in {' and '.join(splits)} first; see {MANIFEST}")
    if leaked.near:
        logger.warning(f"leak: {len(leaked.near)} pairs of clips of different splits look nearly alike, {' and '.join(leaked.near[0])} first; see {MANIFEST}")
