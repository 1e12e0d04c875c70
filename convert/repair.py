"""How to mend shards that are damaged: remove them and let the same pack fill the holes. Its command follows from manifest and plan."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from clips.codecs import make_codec
from clips.manifest import Manifest, index_path, tar_path
from clips.snippets import SOURCE_PATTERN, SPLITS, class_order
from clips.words import counted

from .pack import PackConfig
from .sharding import SplitPlan, clip_bytes, clips_per_shard


def repair_lines(folder: Path, manifest: Manifest, plans: Mapping[str, SplitPlan], broken: Sequence[tuple[str, str]], home: Path | None) -> list[str]:
    """Commands that make the shards `broken`, (split, name) each, anew; none without plans that agree with the manifest: then that comes first."""
    plans = {split: plan for split, plan in plans.items() if _agree(manifest, plan)}
    broken = [one for one in broken if one[0] in plans]
    plans = {split: plan for split, plan in plans.items() if split in dict(broken)}
    if not broken:
        return []
    removed = [f"  rm -f {shlex.quote(str(tar_path(folder, *one)))} {shlex.quote(str(index_path(folder, *one)))}" for one in broken]
    where = "" if home is not None else f", DATASET_HOME being the snippets of {manifest.home.get('folder', 'this folder')}"
    begin = f"To repair {counted(len(broken), 'shard')}, restore from a copy, or remove and pack again{where}:"
    return [begin, *removed, f"  {pack_command(folder, manifest, plans, home)}"]


def pack_command(folder: Path, manifest: Manifest, plans: Mapping[str, SplitPlan], home: Path | None) -> str:
    """The pack that wrote the shards of these splits, with the flags that differ from its defaults."""
    arrays, default = manifest.arrays, PackConfig(Path("home"), Path("out"))
    flags: list[tuple[str, object, object]] = [
        ("--codec", manifest.codec, default.codec),
        ("--quality", manifest.codec_settings.get("quality"), default.quality),
        ("--level", manifest.codec_settings.get("level"), default.level),
        ("--store-size", min(manifest.stored.height, manifest.stored.width) if manifest.stored != manifest.source else None, None),
        ("--shard-mib", _shard_mib(manifest, plans, default.shard_mib), default.shard_mib),
        ("--keypoints", arrays["keypoints_mode"], default.keypoints),
        ("--extras", "keep" if arrays["kept"] else "drop" if arrays["dropped"] else default.extras, default.extras),
        ("--video-key", arrays["video"], default.video_key),
        ("--keypoints-key", arrays["keypoints"], default.keypoints_key),
        ("--source-pattern", manifest.source_pattern, SOURCE_PATTERN),
        ("--max-bad-clips", sum(len(entry.bad) for entry in manifest.splits.values()), default.max_bad_clips),
    ]
    words = ["--dataset-home", "$DATASET_HOME" if home is None else shlex.quote(str(home)), "--output", shlex.quote(str(folder))]
    for flag, value, usual in flags:
        words += [] if value in (None, usual) else [flag, shlex.quote(str(value))]
    words += ["--splits", *(split for split in SPLITS if split in plans)]
    if manifest.classes != class_order(manifest.classes):
        words += ["--classes", *map(shlex.quote, manifest.classes)]
    return " ".join(["python -m convert pack", *words])


def _agree(manifest: Manifest, plan: SplitPlan) -> bool:
    return isinstance(manifest.home, dict) and json.loads(json.dumps(manifest.settings())) == plan.inputs["settings"]


def _shard_mib(manifest: Manifest, plans: Mapping[str, SplitPlan], usual: float) -> float | None:
    """What gives the plans' clips a shard, None for the default; with kept arrays, whose bytes nobody recorded, only the user knows: pack refuses another."""
    count = next(iter(plans.values())).inputs["clips_per_shard"]
    codec = make_codec(manifest.codec, manifest.codec_settings)
    if manifest.arrays["kept"] or count == clips_per_shard(codec, manifest.stored, 0, usual):
        return None
    return math.ceil(count * clip_bytes(codec, manifest.stored, 0) / 2**20 * 1e4) / 1e4
