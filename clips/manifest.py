"""manifest.json: what a folder of shards holds. Written last, so a folder with a manifest is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .clip import ClipSpec
from .errors import ClipError, InputError
from .files import write_whole
from .format import FORMAT_VERSION, FormatError, ShardIndex, unpack_index

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest promises it; `clips_per_class` in label order."""

    name: str
    clips: int
    tar_bytes: int
    tar_sha256: str
    index_sha256: str
    clips_per_class: tuple[int, ...]


@dataclass(frozen=True)
class SplitEntry:
    """One split: its plan, its shards, and the snippets that were left out."""

    plan_id: str
    shards: tuple[ShardEntry, ...]
    bad: tuple[dict[str, str], ...] = ()

    @property
    def num_clips(self) -> int:
        return sum(shard.clips for shard in self.shards)


@dataclass(frozen=True)
class Leaks:
    """What makes val or test too easy: keys of clips with equal bytes in several splits, sources in several splits,

    and pairs of nearly equal clips (None where nobody asked for them).
    """

    identical: list[list[str]] = field(default_factory=list)
    sources: dict[str, list[str]] = field(default_factory=dict)
    near: list[list[str]] | None = None


@dataclass(frozen=True)
class Manifest:
    """`source` is the snippets' geometry, `stored` the frames' in the shards; `arrays` how snippets were read."""

    codec: str
    codec_settings: dict[str, int | str]
    source: ClipSpec
    stored: ClipSpec
    classes: tuple[str, ...]
    home: dict[str, str | int | float]
    arrays: dict[str, str | list[str]]
    source_pattern: str
    leaks: Leaks = field(default_factory=Leaks)
    splits: dict[str, SplitEntry] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What all splits of a folder share: a split may be added later with the same."""
        shared = {name: value for name, value in to_json(self).items() if name not in ("splits", "home", "leaks")}
        return shared | {"home": {name: value for name, value in self.home.items() if name != "folder"}}


def to_json(manifest: Manifest) -> dict[str, Any]:
    return {"format": FORMAT_VERSION, **asdict(manifest)}


def is_packed(folder: Path) -> bool:
    """Whether the folder holds shards (and not snippets)."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Raises InputError for a missing or damaged manifest and for another format version."""
    path = folder / MANIFEST
    try:
        packed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        advice = "Run the same python -m convert pack again, or, after packing in shares, python -m convert merge"
        raise InputError(f"{path}: missing; expected shards that were packed to the end. {advice}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}). Restore it, or remove it and pack again: only what is missing is done.") from error
    if not isinstance(packed, dict) or packed.get("format") != FORMAT_VERSION:
        found = packed.get("format") if isinstance(packed, dict) else type(packed).__name__
        raise InputError(f"{path}: format version {found}; this program reads version {FORMAT_VERSION}. Use the program that packed it, or pack again.")
    try:
        return Manifest(
            codec=packed["codec"],
            codec_settings=packed["codec_settings"],
            source=_spec(packed["source"]),
            stored=_spec(packed["stored"]),
            classes=tuple(packed["classes"]),
            home=packed["home"],
            arrays=packed["arrays"],
            source_pattern=packed["source_pattern"],
            leaks=Leaks(packed["leaks"]["identical"], packed["leaks"]["sources"], packed["leaks"]["near"]),
            splits={name: _split(split) for name, split in packed["splits"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: a field is missing or wrong ({error!r}). Restore the file, or remove it and pack again.") from error


def _spec(packed: dict[str, int]) -> ClipSpec:
    return ClipSpec(packed["frames"], packed["height"], packed["width"])


def _split(packed: dict[str, Any]) -> SplitEntry:
    shards = tuple(
        ShardEntry(s["name"], s["clips"], s["tar_bytes"], s["tar_sha256"], s["index_sha256"], tuple(s["clips_per_class"])) for s in packed["shards"]
    )
    return SplitEntry(packed["plan_id"], shards, tuple(packed["bad"]))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_whole(folder / MANIFEST, (json.dumps(to_json(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def tar_path(folder: Path, split: str, shard: str) -> Path:
    return folder / split / f"{shard}.tar"


def index_path(folder: Path, split: str, shard: str) -> Path:
    return folder / split / f"{shard}.index.mp"


def read_index(folder: Path, split: str, shard: ShardEntry) -> ShardIndex:
    """The shard's index; raises ClipError when it is not the one that the manifest names."""
    path = index_path(folder, split, shard.name)
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise ClipError(f"{path}: cannot be read ({error.strerror or error}). Run python -m convert verify {folder}.") from error
    if hashlib.sha256(blob).hexdigest() != shard.index_sha256:
        raise ClipError(f"{path}: sha256 is not the manifest's; the file changed since it was packed. Run python -m convert verify {folder}.")
    try:
        return unpack_index(blob)
    except FormatError as error:
        raise ClipError(f"{path}: {error}. Run python -m convert verify {folder}.") from error


def fingerprint(keys: Sequence[str], labels: Sequence[int]) -> str:
    """sha256 of sorted keys and labels: equal for the npz folder and its shards."""
    digest = hashlib.sha256()
    for key, label in sorted(zip(keys, labels, strict=True)):
        digest.update(f"{key}\t{label}\n".encode())
    return digest.hexdigest()
