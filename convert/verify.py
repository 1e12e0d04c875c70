"""Whether shards hold what they promise: checksums alone, or every value against the npz.

manifest -> each shard: sha256 -> members against the index -> each clip (members.py) | which clips a change hit -> how to repair (repair.py)
"""

from __future__ import annotations

import logging
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import tyro

from clips import snippets as source
from clips.codecs import make_codec
from clips.environment import allocated_cpus
from clips.errors import ClipError, InputError
from clips.files import sha256_of
from clips.format import FORMAT_VERSION, ShardIndex
from clips.glimpse import expect_shards
from clips.manifest import MANIFEST, Leaks, Manifest, ShardEntry, index_path, read_index, read_manifest, tar_path, to_json
from clips.snippets import Snippet
from clips.words import counted

from . import leaks
from .members import against_npz, damage, read_members, unpacked
from .merge import PLAN, index_fault, indexes, manifest_of, read_plan_file
from .pool import count, in_processes
from .repair import repair_lines
from .sharding import SplitPlan
from .still import is_still, still_in_words
from .verified import forget_verified, not_packed, write_verified

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
    """What was found in one shard; `psnr_db` by key, infinite where frames are equal; `is_broken` where packing it again would help;

    `still` are the keys of clips whose frames are all equal.
    """

    split: str
    shard: str
    problems: list[str] = field(default_factory=list)
    is_broken: bool = False
    clips: int = 0
    psnr_db: dict[str, float] = field(default_factory=dict)
    still: list[str] = field(default_factory=list)

    def add(self, problem: str, of_shard: bool) -> None:
        """A problem, of the shard itself or of its npz."""
        self.problems.append(problem)
        self.is_broken |= of_shard


def verify(config: VerifyConfig) -> int:
    """0 where all is well, 1 where something is wrong; problems go to the log, the verdict to stdout."""
    expect_shards(config.shards)
    manifest = read_manifest(config.shards)
    snippets = _source(config, manifest)
    plans, problems = _plans(config.shards, manifest)
    places = [(split, number) for split, entry in manifest.splits.items() for number in range(len(entry.shards))]
    jobs = [_job(config, manifest, plans.get(split), split, number, snippets) for split, number in places]
    num_clips = sum(split.num_clips for split in manifest.splits.values())
    if snippets is not None:
        forget_verified(config.shards)  # a verify that is killed, or fails, leaves no earlier one's word behind
    reports = list(in_processes(check_shard, jobs, config.workers or allocated_cpus(), num_clips, "verify"))
    problems += sorted(problem for report in reports for problem in report.problems)
    problems += list(_strangers(config.shards, manifest)) + list(_left_out(manifest, snippets))
    if not problems:
        problems += _manifest_problems(config.shards, manifest, plans)
    for problem in problems:
        logger.error(problem)
    for line in repair_lines(config.shards, manifest, plans, sorted((one.split, one.shard) for one in reports if one.is_broken), config.dataset_home):
        logger.error(line)
    if still := sorted(key for report in reports for key in report.still):
        logger.warning(still_in_words(still))
    psnr_db = {key: value for report in reports for key, value in report.psnr_db.items()}
    lossless = make_codec(manifest.codec, manifest.codec_settings).lossless
    if not lossless:
        _report_psnr(psnr_db)
    num_checked = sum(report.clips for report in reports)
    print(f"{counted(num_checked, 'clip')} in {counted(len(jobs), 'shard')} checked, {counted(len(problems), 'problem')}")
    if problems:
        forget_verified(config.shards)
    else:
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
    shard = manifest.splits[split].shards[number]
    report = ShardReport(split, shard.name)
    path = tar_path(folder, split, shard.name)
    try:
        index = read_index(folder, split, shard)
        with path.open("rb") as file:
            for fault in _index_faults(manifest, split, shard, index, plan, number):
                report.add(f"{index_path(folder, split, shard.name)}: {fault}.", True)
            if sha256_of(path) != shard.tar_sha256:
                report.add(_damaged(path, file, index), True)
                report.clips += len(index.clips)
                return report
            members = [(f"{e.facts.key}.{suffix}", place) for e in index.clips for suffix, place in e.members.items()]
            for problem in _tar_problems(path, members):
                report.add(problem, True)
            if not report.problems:
                _check_clips(report, path, file, index, manifest, home, snippets)
    except ClipError as error:
        report.add(f"{str(error).partition(' Run python -m convert verify')[0]} It says where the shard's {counted(shard.clips, 'clip')} lie.", True)
    except OSError as error:
        report.add(f"{path}: cannot be read ({error.strerror or error}). It holds {counted(shard.clips, 'clip')}.", True)
    return report


def _damaged(path: Path, file: BinaryIO, index: ShardIndex) -> str:
    """The clips of a changed tar that are not as they were packed, by name; the index is the manifest's."""
    found = {}
    for entry in index.clips:
        try:
            where = damage(entry, read_members(file, entry))
        except (LookupError, TypeError, ValueError) as error:
            where = f"the index is not as format version {FORMAT_VERSION} says ({error!r})"
        if where:
            found[entry.facts.key] = where
        count()
    begin = f"{path}: sha256 is not the manifest's"
    if not found:
        return f"{begin}; no clip of {len(index.clips)} is damaged, the change lies between them."
    if len(found) == len(index.clips):
        return f"{begin}; all its clips are damaged, {len(index.clips)}."
    return f"{begin}; {len(found)} of {len(index.clips)} clips damaged:" + "".join(f"\n  '{key}': {where}" for key, where in found.items())


def _check_clips(
    report: ShardReport, path: Path, file: BinaryIO, index: ShardIndex, manifest: Manifest, home: Path | None, snippets: dict[str, Snippet] | None
) -> None:
    """The clips of a tar with the right sha256, one after another."""
    for entry in index.clips:
        problems, clip = unpacked(manifest, entry, read_members(file, entry))
        for problem in problems:
            report.add(f"{path}: clip '{entry.facts.key}': {problem}", True)
        if clip is not None and home is not None and snippets is not None:
            of_npz, psnr = against_npz(manifest, entry, clip, home, snippets)
            for problem in of_npz:
                report.add(f"{path}: clip '{entry.facts.key}': {problem}", False)
            if psnr is not None:
                report.psnr_db[entry.facts.key] = psnr
        report.clips += 1
        report.still += [entry.facts.key] if is_still(entry) else []
        count()


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
        yield f"holds {_spelled(per_class)} clips of the classes, the manifest says {_spelled(shard.clips_per_class)}"


def _spelled(counts: Sequence[int]) -> str:
    return " and ".join(map(str, counts))


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
