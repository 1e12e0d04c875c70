"""Which snippet goes into which shard: a pure function of the plan's inputs, whatever packs it, in any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from clips.clip import ClipSpec
from clips.codecs import Codec
from clips.format import FORMAT_VERSION, FRAME
from clips.mix import permutation
from clips.snippets import Snippet, from_listing
from clips.words import counted

MEMBER_OVERHEAD_BYTES = 12 * 1024  # tar headers, padding, json, points of a clip of real size
EXTRAS_RATIO = 0.6  # of raw bytes that zstd leaves of a picture-like array
SEED = 0  # of the order within shards; the order of training has its own


@dataclass(frozen=True)
class SplitPlan:
    """The shards of one split: for each the snippets that it holds, in order. `inputs` is what `plan_id` hashes."""

    split: str
    plan_id: str
    inputs: dict[str, Any]
    shards: tuple[tuple[Snippet, ...], ...]

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:06d}"


def read_plan(packed: dict[str, Any]) -> SplitPlan:
    """The plan that plan.json tells of; KeyError, TypeError or ValueError where it tells of none."""
    inputs = packed["inputs"]
    settings, files = inputs["settings"], inputs["files"]
    if packed["plan_id"] != plan_id_of(inputs):
        raise ValueError("its plan id is not the sha256 of its inputs")
    snippets = from_listing([(path, size) for path, size in files], settings["classes"], settings["home"].get("length_ms"), settings["source_pattern"])
    return SplitPlan(snippets[0].split, packed["plan_id"], inputs, deal(snippets, inputs["clips_per_shard"]))


def with_mended(theirs: SplitPlan, mine: SplitPlan, bad_paths: Collection[str], mended: Mapping[str, int]) -> SplitPlan | None:
    """Their plan with my files' sizes, when I differ from it in nothing but files that it could not use; None otherwise.

    A mended file has another size: without this, mending one would be another plan and pack everything again. `mended` are
    the sizes of those that were packed since.
    """
    if {**theirs.inputs, "files": None} != {**mine.inputs, "files": None}:
        return None
    before, now = dict(theirs.inputs["files"]), dict(mine.inputs["files"])
    known = {path: {size, mended.get(path, size)} for path, size in before.items()}
    if now.keys() - before.keys() or any(now.get(path) not in sizes and path not in bad_paths for path, sizes in known.items()):
        return None
    shards = tuple(tuple(replace(snippet, file_bytes=now.get(snippet.path, snippet.file_bytes)) for snippet in shard) for shard in theirs.shards)
    return replace(theirs, shards=shards)


def mended_sizes(plan: SplitPlan, number: int) -> dict[str, int]:
    """Path to bytes of the shard's snippets whose size is not the one in the plan's inputs."""
    planned = dict(plan.inputs["files"])
    return {snippet.path: snippet.file_bytes for snippet in plan.shards[number] if snippet.file_bytes != planned[snippet.path]}


def plan_split(split: str, snippets: Sequence[Snippet], settings: dict[str, Any], clips_per_shard: int) -> SplitPlan:
    """`settings` are the manifest's: codec, geometry, classes and how arrays are read."""
    inputs = {
        "format": FORMAT_VERSION,
        "settings": settings,
        "seed": SEED,
        "clips_per_shard": clips_per_shard,
        "files": sorted([snippet.path, snippet.file_bytes] for snippet in snippets),
    }
    return SplitPlan(split, plan_id_of(inputs), json.loads(json.dumps(inputs)), deal(snippets, clips_per_shard))


def plan_id_of(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def deal(snippets: Sequence[Snippet], clips_per_shard: int) -> tuple[tuple[Snippet, ...], ...]:
    """Shards of nearly equal size, at most `clips_per_shard`, each with the classes' overall shares, shuffled inside."""
    ordered = sorted(snippets, key=lambda snippet: snippet.key.encode())
    by_label: dict[int, list[Snippet]] = {}
    for number in permutation(len(ordered), "deal", SEED):
        by_label.setdefault(ordered[number].label, []).append(ordered[number])
    spread = sorted(
        (((2 * place + 1) / (2 * len(members)), label, snippet) for label, members in by_label.items() for place, snippet in enumerate(members)),
        key=lambda entry: entry[:2],
    )
    num_shards = -(-len(spread) // clips_per_shard)
    borders = [number * len(spread) // num_shards for number in range(num_shards + 1)]
    shards = []
    for number, (begin, end) in enumerate(pairwise(borders)):
        members = [snippet for _, _, snippet in spread[begin:end]]
        shards.append(tuple(members[place] for place in permutation(len(members), "inside", SEED, number)))
    return tuple(shards)


def clips_per_shard(codec: Codec, stored: ClipSpec, extra_bytes: int, shard_mib: float) -> int:
    """Arithmetic on geometry and settings alone, so that it never depends on what the clips hold; `extra_bytes` are those of kept arrays."""
    return max(1, int(shard_mib * 2**20) // clip_bytes(codec, stored, extra_bytes))


def clip_bytes(codec: Codec, stored: ClipSpec, extra_bytes: int) -> int:
    """The estimate of a clip's bytes in its shard."""
    return codec.estimated_bytes(stored) + int(extra_bytes * EXTRAS_RATIO) + stored.frames * (FRAME.itemsize + 16) + MEMBER_OVERHEAD_BYTES


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What differs between two plans' inputs, in words."""
    found = []
    flat_mine, flat_theirs = _flat(mine), _flat(theirs)
    for name in sorted(flat_mine.keys() | flat_theirs.keys()):
        if flat_mine.get(name) != flat_theirs.get(name):
            found.append(f"{name} is {_spelled(flat_mine.get(name))} here and {_spelled(flat_theirs.get(name))} there")
    mine_files, theirs_files = dict(mine["files"]), dict(theirs.get("files", []))
    names = sorted(mine_files.keys() | theirs_files.keys())
    changed = [name for name in names if mine_files.get(name) != theirs_files.get(name)]
    if changed:
        found.append(f"{counted(len(changed), 'file')} added, removed or changed in size, {changed[0]} first")
    return found


def _spelled(value: Any) -> str:  # Any: JSON
    """As one types it."""
    return (" ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)) or "not set"


def _flat(inputs: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name != "files":
            flat[prefix + name] = value
    return flat
