"""Whether shards hold what they promise: checksums alone, or every value against the npz.

manifest -> each shard: sha256 -> members against the index -> frames decoded -> (npz: arrays, labels, PSNR)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from clips import snippets as source
from clips.codecs import make_codec
from clips.environment import allocated_cpus
from clips.errors import ClipError, InputError
from clips.files import sha256_of
from clips.format import FORMAT_VERSION, IndexEntry, ShardIndex, unpack_array, unpack_map, unpack_points
from clips.keypoints import mask_of
from clips.manifest import MANIFEST, Leaks, Manifest, ShardEntry, index_path, read_index, read_manifest, tar_path, to_json
from clips.npz import BadNpz
from clips.snippets import ArrayNames, Snippet, read

from . import leaks
from .encode import dhash, num_constant, sha256_of_array, stored_frames, told_of
from .merge import PLAN, index_fault, indexes, manifest_of, read_plan_file
from .pool import count, in_processes
from .sharding import SplitPlan
from .verified import not_packed, write_verified

logger = logging.getLogger(__name__)

LOW_PSNR_DB = 35.0  # real clips at quality 90 have about 40 dB; below 35 blocks become visible
WORST_LISTED = 10


@dataclass(frozen=True)
class VerifyConfig:
    """Checks shards against their manifest, and against the npz where they are at hand."""

    shards: tyro.conf.Positional[Path]
    """The folder that pack wrote."""
    dataset_home: Path | None = None
    """The npz snippets; without them checksums and structure are checked."""
    workers: int | None = None
    """Processes; default: the allocated CPUs, at most 8 outside a SLURM job."""


@dataclass
class ShardReport:
    """What was found in one shard; `psnr_db` by key, infinite where frames are equal."""

    problems: list[str] = field(default_factory=list)
    clips: int = 0
    psnr_db: dict[str, float] = field(default_factory=dict)


def verify(config: VerifyConfig) -> int:
    """0 where all is well, 1 where something is wrong; problems go to the log, the verdict to stdout."""
    manifest = read_manifest(config.shards)
    snippets = _source(config, manifest)
    plans, problems = _plans(config.shards, manifest)
    places = [(split, number) for split, entry in manifest.splits.items() for number in range(len(entry.shards))]
    jobs = [_job(config, manifest, plans.get(split), split, number, snippets) for split, number in places]
    num_clips = sum(split.num_clips for split in manifest.splits.values())
    reports = list(in_processes(check_shard, jobs, config.workers or allocated_cpus(), num_clips, "verify"))
    problems += sorted(problem for report in reports for problem in report.problems)
    problems += list(_strangers(config.shards, manifest)) + list(_left_out(manifest, snippets))
    if not problems:
        problems += _manifest_problems(config.shards, manifest, plans)
    for problem in problems:
        logger.error(problem)
    psnr_db = {key: value for report in reports for key, value in report.psnr_db.items()}
    lossless = make_codec(manifest.codec, manifest.codec_settings).lossless
    if not lossless:
        _report_psnr(psnr_db)
    print(f"{sum(report.clips for report in reports)} clips in {len(jobs)} shards checked, {len(problems)} problems")
    if not problems:
        if snippets is not None:
            write_verified(config.shards, psnr_db)
        print(_verdict(manifest, psnr_db, snippets is not None, lossless))
    return 1 if problems else 0


def _source(config: VerifyConfig, manifest: Manifest) -> dict[str, Snippet] | None:
    """The snippets by key, as the manifest reads them; None without a home."""
    if config.dataset_home is None:
        return None
    home = source.find(config.dataset_home, (), manifest.classes, manifest.source_pattern)
    return {snippet.key: snippet for split in home.splits.values() for snippet in split}


def _plans(folder: Path, manifest: Manifest) -> tuple[dict[str, SplitPlan], list[str]]:
    """Each split's plan, which names every clip of every shard, and what is wrong with the plans."""
    plans, problems = {}, []
    for split, entry in manifest.splits.items():
        try:
            plan = read_plan_file(folder, split)
        except InputError as error:
            problems.append(str(error))
            continue
        if plan.plan_id != entry.plan_id or len(plan.shards) != len(entry.shards):
            problems.append(f"{folder / split / PLAN}: another plan than the manifest's. Restore it, or pack again into a new folder.")
        else:
            plans[split] = plan
    return plans, problems


def _manifest_problems(folder: Path, manifest: Manifest, plans: dict[str, SplitPlan]) -> list[str]:
    """Whether whole plans and indexes make just this manifest again."""
    found = {split: indexes(folder, plans[split]) for split in source.SPLITS if split in plans}
    entries = {split: [entry for index in of_split.values() for entry in index.clips] for split, of_split in found.items()}
    near = None if manifest.leaks.near is None else leaks.near(entries)
    again = to_json(manifest_of(folder, [plans[split] for split in found], found, Leaks(leaks.identical(entries), leaks.shared_sources(entries), near)))
    different = [name for name, value in to_json(manifest).items() if again[name] != value]
    advice = f"Restore it, or remove it and run python -m convert merge {folder}."
    return [f"{folder / MANIFEST}: its {', '.join(different)} is not what plans and indexes say. {advice}"] if different else []


Job = tuple[Path, Manifest, str, int, SplitPlan | None, Path | None, dict[str, Snippet] | None]


def _job(config: VerifyConfig, manifest: Manifest, plan: SplitPlan | None, split: str, number: int, snippets: dict[str, Snippet] | None) -> Job:
    """What `check_shard` needs, and no more: it travels to another process."""
    alone = replace(manifest, splits={split: manifest.splits[split]}, leaks=Leaks())
    if plan is not None:
        keys = {snippet.key for snippet in plan.shards[number]}
        plan = replace(plan, inputs={}, shards=tuple(shard if place == number else () for place, shard in enumerate(plan.shards)))
        snippets = None if snippets is None else {key: snippet for key, snippet in snippets.items() if key in keys}
    return config.shards, alone, split, number, plan, config.dataset_home, snippets


def check_shard(
    folder: Path, manifest: Manifest, split: str, number: int, plan: SplitPlan | None, home: Path | None, snippets: dict[str, Snippet] | None
) -> ShardReport:
    """Everything that can be wrong with one shard; it goes on after a problem as long as that makes sense."""
    report = ShardReport()
    shard = manifest.splits[split].shards[number]
    path = tar_path(folder, split, shard.name)
    try:
        index = read_index(folder, split, shard)
        if sha256_of(path) != shard.tar_sha256:
            report.problems.append(f"{path}: sha256 is not the manifest's. Remove this file and run the same pack again, or restore it.")
    except ClipError as error:
        report.problems.append(str(error))
        return report
    except OSError as error:
        report.problems.append(f"{path}: cannot be read ({error.strerror or error}). Run the same pack again, or restore it.")
        return report
    report.problems += [f"{index_path(folder, split, shard.name)}: {fault}." for fault in _index_faults(manifest, split, shard, index, plan, number)]
    members = [(f"{e.facts.key}.{suffix}", place) for e in index.clips for suffix, place in e.members.items()]
    report.problems += _tar_problems(path, members)
    if report.problems:
        return report
    with path.open("rb") as file:
        for entry in index.clips:
            blobs = {}
            for suffix, (offset, size) in entry.members.items():
                file.seek(offset)
                blobs[suffix] = file.read(size)
            try:
                problems = list(_clip_problems(manifest, entry, blobs, home, snippets, report))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                problems = [f"a member is not as format version {FORMAT_VERSION} says ({error!r})"]
            report.problems += [f"{path}: clip '{entry.facts.key}': {problem}" for problem in problems]
            report.clips += 1
            count()
    return report


def _index_faults(manifest: Manifest, split: str, shard: ShardEntry, index: ShardIndex, plan: SplitPlan | None, number: int) -> Iterator[str]:
    """What index and manifest, and index and plan, disagree on."""
    if (index.plan_id, index.shard, len(index.clips)) != (manifest.splits[split].plan_id, shard.name, shard.clips):
        yield "is of another plan or shard than the manifest says"
    elif plan is not None and (fault := index_fault(plan, number, index)):
        yield fault
    if (index.tar_bytes, index.tar_sha256) != (shard.tar_bytes, shard.tar_sha256):
        yield "tells of another tar than the manifest"
    per_class = [sum(entry.facts.label == label for entry in index.clips) for label in range(len(manifest.classes))]
    if per_class != list(shard.clips_per_class):
        yield f"holds {per_class} clips of the classes, the manifest says {list(shard.clips_per_class)}"


def _tar_problems(path: Path, members: list[tuple[str, tuple[int, int]]]) -> Iterator[str]:
    """Whether the tar, read by Python's tarfile, holds just the members of the index, at their places."""
    try:
        with tarfile.open(path, "r:") as tar:
            found = [(info.name, (info.offset_data, info.size)) for info in tar]
    except (tarfile.TarError, OSError) as error:
        yield f"{path}: not a whole tar ({error})"
        return
    for expected, there in zip(members, found, strict=False):
        if expected != there:
            yield f"{path}: member {there[0]} at {there[1]}; the index promises {expected[0]} at {expected[1]}"
            return
    if len(members) != len(found):
        yield f"{path}: {len(found)} members; the index promises {len(members)}"


def _clip_problems(
    manifest: Manifest, entry: IndexEntry, blobs: dict[str, bytes], home: Path | None, snippets: dict[str, Snippet] | None, report: ShardReport
) -> Iterator[str]:
    facts = entry.facts
    try:
        provenance = json.loads(blobs["json"])
        label = int(blobs["cls"])
        frames = unpack_map(blobs["frames.mp"])
    except (KeyError, ValueError) as error:
        yield f"a member is missing or damaged ({error!r})"
        return
    class_name = provenance["path"].split("/")[1]
    if label != facts.label or class_name not in manifest.classes or manifest.classes.index(class_name) != label:
        yield f"label {label} in its member, {facts.label} in the index, its path says {class_name}"
    told = {name: provenance[name] for name in ("source", "index", "begin_ms", "end_ms", "frames_valid")} | {"key": source.key_of(provenance["path"])}
    if different := sorted(name for name, value in told.items() if getattr(facts, name) != value):
        yield f"its json and the index disagree on {', '.join(different)}"
    if {suffix: zlib.crc32(blob) for suffix, blob in blobs.items()} != entry.crc32:
        yield "a member has another crc32 than the index says"
    if {suffix: hashlib.sha256(blob).hexdigest() for suffix, blob in blobs.items() if suffix not in ("cls", "json")} != provenance["members"]:
        yield "a member is not the one that its json tells of"
    of_video = provenance["arrays"][manifest.arrays["video"]]
    if entry.video_sha256 != of_video["sha256"]:
        yield "its json and the index disagree on the source video"
    shape = list(manifest.source.video_shape)
    if (of_video["dtype"], of_video["shape"], provenance["source_shape"]) != ("|u1", shape, shape):
        yield f"its json tells of another source video than the manifest's uint8 {shape}"
    video = np.empty(manifest.stored.video_shape, np.uint8)
    if problem := _decode(manifest, entry, frames, blobs["frames.mp"], video):
        yield problem
        return
    keypoints = _mask(blobs)
    for name, array in [(manifest.arrays["keypoints"], keypoints)] + [(n, _extra(blobs, n)) for n in manifest.arrays["kept"]]:
        known = provenance["arrays"].get(name)
        if (known is None) != (array is None):
            yield f"array '{name}' is in its member or in its json, but not in both"
        elif array is not None and (list(array.shape), sha256_of_array(array.astype(known["dtype"]))) != (known["shape"], known["sha256"]):
            yield f"array '{name}' has another sha256 or shape than the npz had when it was packed"
    lossless = make_codec(manifest.codec, manifest.codec_settings).lossless
    if lossless and sha256_of_array(video) != of_video["sha256"]:
        yield "frames have another sha256 than the npz had when it was packed"
    if lossless and not _looks_like(video, entry):
        yield "its frames look otherwise than the index says (frames_valid, dhash or frames_constant)"
    if home is not None and snippets is not None:
        yield from _against_npz(manifest, entry, provenance["arrays"], video, keypoints, home, snippets, lossless, report)


def _decode(manifest: Manifest, entry: IndexEntry, frames: dict[str, Any], member: bytes, video: np.ndarray) -> str | None:  # Any: a msgpack map
    """Fills `video`; the reason when the frames are not as promised or not where the index says."""
    codec = make_codec(manifest.codec, manifest.codec_settings)
    blobs = frames["frames"]
    if (frames["codec"], tuple(frames["shape"])) != (codec.name, video.shape) or {len(blobs), len(entry.frames), len(frames["crc32"])} != {len(video)}:
        found = f"{frames['codec']} {frames['shape']}, {len(blobs)} in the member and {len(entry.frames)} in the index"
        return f"frames are {found}; the manifest promises {codec.name} {list(video.shape)}"
    start = entry.members["frames.mp"][0]
    for number, (blob, crc32, record) in enumerate(zip(blobs, frames["crc32"], entry.frames, strict=True)):
        offset = int(record["offset"]) - start
        if offset < 0 or member[offset : offset + int(record["size"])] != blob:
            return f"frame {number} is not where the index says"
        if not zlib.crc32(blob) == crc32 == record["crc32"]:
            return f"frame {number} has another crc32 than recorded"
        try:
            codec.decode(blob, video[number])
        except ValueError as error:
            return f"frame {number} does not decode ({error})"
    return None


def _mask(blobs: dict[str, bytes]) -> np.ndarray | None:
    if "keypoints.mp" not in blobs:
        return None
    points, shape = unpack_points(blobs["keypoints.mp"])
    return mask_of(points, shape)


def _extra(blobs: dict[str, bytes], name: str) -> np.ndarray | None:
    return unpack_array(blobs[f"{name}.mp"]) if f"{name}.mp" in blobs else None


def _against_npz(
    manifest: Manifest,
    entry: IndexEntry,
    known: dict[str, dict[str, Any]],  # of each packed array: dtype, shape, sha256
    video: np.ndarray,
    keypoints: np.ndarray | None,
    home: Path,
    snippets: dict[str, Snippet],
    lossless: bool,
    report: ShardReport,
) -> Iterator[str]:
    snippet = snippets.get(entry.facts.key)
    if snippet is None:
        yield f"its npz is not in {home}"
        return
    if snippet.label != entry.facts.label:
        yield f"label {entry.facts.label}; its folder in {home} says {snippet.label} ({snippet.class_name})"
    arrays = manifest.arrays
    names = ArrayNames(str(arrays["video"]), str(arrays["keypoints"]), arrays["keypoints_mode"])  # type: ignore[arg-type]  # as pack checked it
    try:
        content = read(home / snippet.path, manifest.source, names, arrays["kept"])
    except BadNpz as error:
        yield f"its npz cannot be read: {error}"
        return
    there = {names.video: content.video, names.keypoints: content.keypoints, **content.extras}
    now = {name: told_of(array) for name, array in there.items() if array is not None}
    same = [name for name in now.keys() & known.keys() if now[name].items() <= known[name].items()]
    if changed := sorted((now.keys() | known.keys()) - set(same)):
        yield f"its npz changed since it was packed: {', '.join(changed)}"
    elif not _looks_like(content.video, entry):
        yield f"{home / snippet.path} looks otherwise than the index says (frames_valid, dhash or frames_constant)"
    theirs = content.keypoints
    if (theirs is None) != (keypoints is None) or (theirs is not None and keypoints is not None and not np.array_equal(theirs, keypoints)):
        yield f"keypoints differ from {home / snippet.path}"
    expected = stored_frames(content.video, manifest.stored)
    if lossless and not np.array_equal(expected, video):
        yield f"frames differ from {home / snippet.path}"
    report.psnr_db[entry.facts.key] = psnr_db(expected, video)


def _looks_like(video: np.ndarray, entry: IndexEntry) -> bool:
    """Whether the source video has what the index tells of its look."""
    count = source.frames_valid(video)
    valid = video[:count]
    return (count, dhash(valid), num_constant(valid)) == (entry.facts.frames_valid, entry.dhash, entry.frames_constant)


def psnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Of two uint8 videos of one shape, over all frames: 10 log10(255² / mean squared error); infinite when equal."""
    squares = 0.0
    for a, b in zip(expected, found, strict=True):
        difference = a.reshape(-1).astype(np.float32) - b.reshape(-1)
        squares += float(np.dot(difference, difference))
    return math.inf if squares == 0 else 10 * math.log10(255**2 * expected.size / squares)


def _strangers(folder: Path, manifest: Manifest) -> Iterator[str]:
    for split in source.SPLITS:
        known = {f"{shard.name}{suffix}" for shard in (manifest.splits[split].shards if split in manifest.splits else ()) for suffix in (".tar", ".index.mp")}
        for path in sorted((folder / split).glob("[!.]*")):
            if path.name.endswith((".tar", ".index.mp")) and path.name not in known:
                yield f"{path}: not in the manifest. Remove it, or pack again into a new folder."


def _left_out(manifest: Manifest, snippets: dict[str, Snippet] | None) -> Iterator[str]:
    """Snippets of the packed splits that no shard holds."""
    for split, entry in manifest.splits.items():
        there = sum(snippet.split == split for snippet in (snippets or {}).values())
        if snippets is not None and there > entry.num_clips + len(entry.bad):
            yield f"{split}: the home holds {there} snippets and the shards {entry.num_clips} clips. Pack the home into a new folder."


def _report_psnr(psnr_db: dict[str, float]) -> None:
    """The worst clips by name."""
    worst = sorted((value, key) for key, value in psnr_db.items())[:WORST_LISTED]
    for value, key in worst:
        logger.info(f"{value:.1f} dB: '{key}'{', low quality' if value < LOW_PSNR_DB else ''}")
    if low := sum(value < LOW_PSNR_DB for value in psnr_db.values()):
        logger.warning(f"low quality: {low} clips below {LOW_PSNR_DB:.0f} dB; take a higher --quality or --codec zstd")


def _verdict(manifest: Manifest, psnr_db: dict[str, float], with_source: bool, lossless: bool) -> str:
    """Whether the npz may go; it names what was not packed."""
    missing = not_packed(manifest)
    if not with_source:
        return f"whole: as packed{missing}. Whether it equals the npz: python -m convert verify --dataset-home"
    if lossless:
        return f"bit-exact: npz can be rebuilt{missing}"
    finite = [value for value in psnr_db.values() if math.isfinite(value)] or [math.inf]  # a clip that JPEG keeps exactly has no finite one
    return f"frames lossy (min {min(finite):.1f} dB, mean {sum(finite) / len(finite):.1f} dB): keep the npz or pack zstd{missing}"
