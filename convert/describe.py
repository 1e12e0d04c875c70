"""What a folder of shards holds, from its manifest and indexes alone: a table to read, and the same facts as JSON.

manifest + indexes -> facts -> lines | JSON
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from clips.clip import ClipSpec
from clips.codecs import make_codec
from clips.errors import InputError
from clips.files import write_json
from clips.format import ClipFacts, ShardIndex
from clips.glimpse import expect_shards
from clips.manifest import Leaks, Manifest, read_index, read_manifest
from clips.snippets import SPLITS

from .still import is_still, still_in_words
from .verified import Quality, read_verified
from .view import check_folder

SHOWN = 5  # names or reasons that a line lists; JSON has all


@dataclass(frozen=True)
class DescribeConfig:
    """Tells what shards hold: classes, sources, sizes, codec, geometry, padding and times."""

    shards: tyro.conf.Positional[Path]
    """The folder that pack wrote."""
    json: Path | None = None
    """Also write the facts to this file, as JSON."""


@dataclass(frozen=True)
class Group:
    """Clips of one class."""

    clips: int
    sources: int


@dataclass(frozen=True)
class Split:
    """One split; `frames_valid` counts clips by their number of valid frames, `with_constant_frames` those with valid frames of one colour,

    `still` are the keys of clips whose valid frames are all equal, and `left_out` the bad snippets.
    """

    clips: int
    sources: int
    classes: dict[str, Group]
    shards: int
    tar_bytes: int
    frame_bytes: int
    frames_valid: dict[int, int]
    padded: int
    with_times: int
    with_keypoints: int
    with_constant_frames: int
    still: list[str]
    left_out: list[dict[str, str]]


@dataclass(frozen=True)
class Facts:
    """A folder of shards; `raw_clip_bytes` is a clip's uncompressed video in the npz, `all` are the splits together."""

    folder: str
    home: dict[str, str | int | float]
    codec: str
    codec_settings: dict[str, int | str]
    lossless: bool
    source: ClipSpec
    stored: ClipSpec
    raw_clip_bytes: int
    arrays: dict[str, str | list[str]]
    leaks: Leaks
    quality: dict[str, Quality] | None
    splits: dict[str, Split]
    all: Split


def describe(config: DescribeConfig) -> int:
    """0; the tables go to stdout."""
    if config.json is not None:
        check_folder(config.json, "--json")
    facts = gather(config.shards)
    print("\n".join(lines(facts)))
    if config.json is not None:
        try:
            write_json(config.json, as_json(facts))
        except OSError as error:
            raise InputError(f"--json {config.json}: cannot be written ({error.strerror or error}). Name another file.") from error
    return 0


def gather(folder: Path) -> Facts:
    """Raises InputError for a folder without a manifest, ClipError for an index that changed."""
    expect_shards(folder)
    manifest = read_manifest(folder)
    names = [split for split in SPLITS if split in manifest.splits]
    indexes = {split: [read_index(folder, split, shard) for shard in manifest.splits[split].shards] for split in names}
    return Facts(
        folder=str(folder),
        home=manifest.home,
        codec=manifest.codec,
        codec_settings=manifest.codec_settings,
        lossless=make_codec(manifest.codec, manifest.codec_settings).lossless,
        source=manifest.source,
        stored=manifest.stored,
        raw_clip_bytes=manifest.source.frames * manifest.source.height * manifest.source.width * 3,
        arrays=manifest.arrays,
        leaks=manifest.leaks,
        quality=read_verified(folder),
        splits={split: _group(manifest, [split], indexes[split]) for split in names},
        all=_group(manifest, names, [index for found in indexes.values() for index in found]),
    )


def _group(manifest: Manifest, splits: Sequence[str], indexes: Sequence[ShardIndex]) -> Split:
    """The facts of one split, or of several together."""
    clips = [clip for index in indexes for clip in index.clips]
    facts = [clip.facts for clip in clips]
    left_out = [bad for split in splits for bad in manifest.splits[split].bad] + [bad for index in indexes for bad in index.bad]
    by_class = {name: [one for one in facts if one.label == label] for label, name in enumerate(manifest.classes)}
    valid = Counter(one.frames_valid for one in facts)
    return Split(
        clips=len(clips),
        sources=_num_sources(facts),
        classes={name: Group(len(members), _num_sources(members)) for name, members in by_class.items()},
        shards=len(indexes),
        tar_bytes=sum(index.tar_bytes for index in indexes),
        frame_bytes=sum(int(clip.frames["size"].sum()) for clip in clips),
        frames_valid=dict(sorted(valid.items())),
        padded=len(clips) - valid[manifest.source.frames],
        with_times=sum(one.begin_ms is not None for one in facts),
        with_keypoints=sum("keypoints.mp" in clip.members for clip in clips),
        with_constant_frames=sum(clip.frames_constant > 0 for clip in clips),
        still=sorted(clip.facts.key for clip in clips if is_still(clip)),
        left_out=[bad for number, bad in enumerate(left_out) if bad not in left_out[:number]],
    )


def _num_sources(facts: Sequence[ClipFacts]) -> int:
    return len({one.source for one in facts})


def as_json(facts: Facts) -> dict[str, Any]:  # Any: JSON
    """The facts, with the size of a clip and its share of the raw video beside each split."""
    packed = asdict(facts)
    for values, target in [(facts.all, packed["all"]), *((values, packed["splits"][split]) for split, values in facts.splits.items())]:
        target |= {"clip_bytes": _clip_bytes(values), "share_of_raw": _share_of_raw(facts, values)}
    return packed


def lines(facts: Facts) -> list[str]:
    """What a person reads, tables aligned."""
    splits = facts.splits
    told = [
        str(facts.home.get("folder", facts.folder)),
        *(f"  {line}" for line in [*meaning(facts), *_how_stored(facts)]),
        "",
        *table(["split", "class", "clips", "sources"], _class_rows(facts), left=2),
        "",
        *table(["split", "shards", "MB", "MB a clip", "of raw", "padded", "with times", "with keypoints", "left out"], _size_rows(facts), left=1),
        "",
    ]
    told += _quality(facts)
    told += [f"frames_valid in {split}: {_histogram(values, facts.source.frames)}" for split, values in splits.items() if values.clips]
    told += [f"frames of one colour in {split}: {values.with_constant_frames} clips" for split, values in splits.items() if values.with_constant_frames]
    told += [f"{split}: {still_in_words(values.still)}" for split, values in splits.items() if values.still]
    told += _leaked(facts)
    for split, values in splits.items():
        told += [f"left out of {split}: {bad.get('path', '?')}: {bad.get('reason', 'no reason')}" for bad in values.left_out[:SHOWN]]
        if len(values.left_out) > SHOWN:
            told.append(f"left out of {split}: {len(values.left_out) - SHOWN} more")
    return told


def _quality(facts: Facts) -> list[str]:
    """PSNR against the npz, as the last verify found it."""
    if facts.quality is None:
        return ["PSNR: not measured; python -m convert verify SHARDS --dataset-home HOME measures it"]
    return [
        f"PSNR in {split}: "
        + ("equal, bit for bit" if found.psnr_min_db is None else f"min {found.psnr_min_db:.1f} dB, mean {found.psnr_mean_db:.1f} dB")
        + f" over {found.clips} clips"
        for split, found in facts.quality.items()
    ]


def _leaked(facts: Facts) -> list[str]:
    """What is known of a test set that is easier than it looks."""
    identical, near = ([" = ".join(keys) for keys in pairs or ()] for pairs in (facts.leaks.identical, facts.leaks.near))
    found = [("sources", list(facts.leaks.sources)), ("clips with equal bytes", identical), ("pairs of nearly equal clips", near)]
    return [f"in more than one split: {len(names)} {what} ({_some(names)})" for what, names in found if names]


def meaning(facts: Facts) -> list[str]:
    """What the home's name says, in words."""
    home, frames = facts.home, facts.source.frames
    if "length_ms" not in home:
        return ["the home's name does not tell length, sample rate and IoU: begin and end in ms are unknown"]
    length_ms = float(home["length_ms"])
    told = [f"length {home['length_ms']}: a snippet is {home['length_ms']} ms of its source: {frames} frames, {1000 * frames / length_ms:.1f} a second"]
    if "sample_rate" in home:
        rate = int(home["sample_rate"])
        told.append(f"sample rate {rate}: " + ("every frame of the source was kept" if rate == 1 else f"one of {rate} frames of the source was kept"))
    if "iou" in home:
        told.append(f"IoU {home['iou']}: the share of a snippet that must meet an annotation")
    return told


def _how_stored(facts: Facts) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in facts.codec_settings.items())
    smaller = "as in the npz" if facts.stored == facts.source else f"made smaller from {facts.source}"
    arrays = facts.arrays
    kept, dropped = (", ".join(arrays.get(name, [])) or "none" for name in ("kept", "dropped"))
    return [
        f"codec {facts.codec}, {settings}: {'bit-exact' if facts.lossless else 'lossy'}",
        f"frames {facts.stored}, {smaller}; raw video {facts.raw_clip_bytes / 1e6:.1f} MB a clip",
        f"arrays: frames from '{arrays.get('video')}', keypoints from '{arrays.get('keypoints')}' ({arrays.get('keypoints_mode')});"
        f" others kept: {kept}, dropped: {dropped}",
    ]


def _with_all(facts: Facts) -> list[tuple[str, Split]]:
    """The splits and, where there are several, all of them together."""
    return [*facts.splits.items(), *([("all", facts.all)] if len(facts.splits) > 1 else [])]


def _class_rows(facts: Facts) -> list[list[str]]:
    rows = []
    for split, values in _with_all(facts):
        rows += [[split, name, str(group.clips), str(group.sources)] for name, group in values.classes.items()]
        rows.append([split, "together", str(values.clips), str(values.sources)])
    return [["" if number and row[0] == rows[number - 1][0] else row[0], *row[1:]] for number, row in enumerate(rows)]


def _size_rows(facts: Facts) -> list[list[str]]:
    rows = []
    for split, values in _with_all(facts):
        clip_bytes, share = _clip_bytes(values), _share_of_raw(facts, values)
        rows.append(
            [
                split,
                str(values.shards),
                f"{values.tar_bytes / 1e6:.1f}",
                "-" if clip_bytes is None else f"{clip_bytes / 1e6:.3f}",
                "-" if share is None else f"{share:.1%}",
                *map(str, (values.padded, values.with_times, values.with_keypoints, len(values.left_out))),
            ]
        )
    return rows


def _clip_bytes(values: Split) -> int | None:
    """Of the shards, tar's own bytes counted; None for a split without clips."""
    return round(values.tar_bytes / values.clips) if values.clips else None


def _share_of_raw(facts: Facts, values: Split) -> float | None:
    return round(values.tar_bytes / values.clips / facts.raw_clip_bytes, 6) if values.clips else None


def _histogram(values: Split, frames: int) -> str:
    """`58 whole (39 frames), 4 padded: 1 with 20-29, 3 with 30-38`: the padded by quarters of the clip."""
    if not values.padded:
        return f"all {values.clips} clips are whole ({frames} frames)"
    quarters: Counter[int] = Counter()
    for valid, num_clips in values.frames_valid.items():
        if valid < frames:
            quarters[4 * valid // frames] += num_clips
    spans = {quarter: (max(1, -(-quarter * frames // 4)), -(-(quarter + 1) * frames // 4) - 1) for quarter in quarters}
    told = [f"{num_clips} with {low}" + (f"-{high}" if high > low else "") for quarter, num_clips in sorted(quarters.items()) for low, high in [spans[quarter]]]
    return f"{values.clips - values.padded} whole ({frames} frames), {values.padded} padded: {', '.join(told)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Aligned lines: the first `left` columns to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in [head, *rows]
    ]
