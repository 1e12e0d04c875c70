"""What packing a snippet costs a core: ours against the plain way and against the floor, on the same snippets in one run.

floor: inflate -> crc32 -> sha256 of the arrays -> encode                         from memory to memory, the fastest inflate at hand
ours:  read -> check -> the same, points, facts of the clip -> a shard and its index
plain: np.load -> the same hashes, points by np.argwhere -> webdataset's ShardWriter
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from isal import isal_zlib

from clips.codecs import make_codec
from clips.errors import InputError
from clips.npz import read_headers
from clips.snippets import ArrayNames, Home, Snippet, check_headers, find
from convert.encode import Recipe, encode_clip
from convert.sharding import clips_per_shard
from convert.writer import write_shard

from .result import Result, cell, file_system_of, measure, pinned_to_one_core, result, table, write_results

Inflate = Callable[[bytes, int], bytes]  # a deflated member and the bytes that it holds -> those bytes
Measured = dict[str, list[float]]  # name to one value a round

QUALITY = 90
SMALL_SHARD_CLIPS = 2
RAW_DEFLATE = -15  # zlib's wbits for a stream without header
# Name to module and its call. isal and zlib-ng take a buffer one byte longer than the member: they double an exactly full one before they see the end.
INFLATES: dict[str, tuple[str, Callable[[Any], Inflate]]] = {  # Any: a module
    "zlib": ("zlib", lambda module: lambda blob, num_bytes: module.decompress(blob, RAW_DEFLATE, num_bytes)),
    "isal": ("isal.isal_zlib", lambda module: lambda blob, num_bytes: module.decompress(blob, RAW_DEFLATE, num_bytes + 1)),
    "zlib-ng": ("zlib_ng.zlib_ng", lambda module: lambda blob, num_bytes: module.decompress(blob, RAW_DEFLATE, num_bytes + 1)),
    "libdeflate": ("deflate", lambda module: lambda blob, num_bytes: module.deflate_decompress(blob, num_bytes)),
}

PACK_IN_A_WORKER = """
import json, resource, sys
from pathlib import Path
from clips.codecs import make_codec
from convert.encode import Recipe
from convert.pack import PackConfig, pack
from convert.pool import in_processes

def peak_kib():  # the greatest VmHWM of the worker processes that have ended
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss

if __name__ == "__main__":
    home, output, quality, shard_mib = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    recipe = Recipe("jpeg", {"quality": quality}, None, None, None, ())
    list(in_processes(Recipe.make_codec, [(recipe,)], 1, 0, "import"))
    imports = peak_kib()
    manifest = pack(PackConfig(home, output, quality=quality, shard_mib=shard_mib, workers=1, keypoints="optional", extras="drop"))
    print(json.dumps([imports, peak_kib(), max(shard.clips for split in manifest.splits.values() for shard in split.shards)]))
"""


@dataclass(frozen=True)
class ConvertBenchConfig:
    """CPU ms a clip and clips/s of packing snippets on one core, and a worker's memory."""

    dataset_home: Path
    """Snippets as npz."""
    clips: int = 16
    """How many of them, spread over all sources; about 7 MB of memory each."""
    rounds: int = 5
    """Measured passes of each way, after one that warms up."""
    json: Path | None = None
    """Append the results here."""

    def __post_init__(self) -> None:
        if self.clips < 1 or self.rounds < 1:
            raise InputError(f"--clips {self.clips} --rounds {self.rounds}: expected at least 1 of each.")


def bench_convert(config: ConvertBenchConfig) -> list[Result]:
    """Prints what it found and gives the results."""
    home = find(config.dataset_home)
    chosen, recipe = chosen_clips(home, config.clips)
    inflates = {name: inflate for name in INFLATES if (inflate := _inflate(name))}
    members = [_members(home.path / snippet.path, recipe.names) for snippet in chosen]
    with tempfile.TemporaryDirectory() as folder, pinned_to_one_core():
        reading: dict[str, Callable[[], object]] = {name: partial(_inflate_all, members, inflate) for name, inflate in inflates.items()}
        reading["np.load"] = partial(_load_all, home, chosen, recipe.names)
        inflating, _ = measure(reading, len(chosen), config.rounds)
        fastest = min(inflates, key=lambda name: sum(inflating[name]))
        ways: dict[str, Callable[[], object]] = {
            "floor": partial(_floor, members, inflates[fastest], recipe),
            "ours": partial(_ours, home, chosen, recipe, Path(folder)),
            "plain": partial(_plain, home, chosen, recipe, Path(folder)),
        }
        cpu_ms, clips_per_s = measure(ways, len(chosen), config.rounds)
    ratios = {f"{a} over {b}": [x / y for x, y in zip(cpu_ms[a], cpu_ms[b], strict=True)] for a, b in (("ours", "floor"), ("plain", "ours"))}
    memory = [_worker_memory(home, chosen, recipe, clips) for clips in (SMALL_SHARD_CLIPS, len(chosen))]
    _show(recipe, fastest, inflating, cpu_ms, clips_per_s, ratios, memory)
    setting = {"clips": len(chosen), "codec": recipe.codec, **recipe.codec_settings, "video": list(recipe.source.video_shape), "floor_inflates_by": fastest}
    results = [result(f"convert/inflate/{name}", "CPU ms/clip", values, setting) for name, values in inflating.items()]
    results += [result(f"convert/{name}/cpu", "CPU ms/clip", values, setting) for name, values in cpu_ms.items()]
    results += [result(f"convert/{name}/speed", "clips/s", values, setting) for name, values in clips_per_s.items()]
    results += [result(f"convert/{name.replace(' ', '_')}", "ratio", values, setting) for name, values in ratios.items()]
    results += [result("convert/memory_above_imports", "MB", [above], setting | {"clips_per_shard": clips}) for clips, _, above in memory]
    if config.json:
        write_results(config.json, results, file_system_of(config.dataset_home))
    return results


def chosen_clips(home: Home, num_clips: int, quality: int = QUALITY) -> tuple[list[Snippet], Recipe]:
    """Snippets spread over all sources and along each, and how `pack` would store them; raises InputError where they do not fit together."""
    by_source: dict[str, list[Snippet]] = {}
    for snippet in (snippet for snippets in home.splits.values() for snippet in snippets):
        by_source.setdefault(snippet.source, []).append(snippet)
    each = -(-num_clips // len(by_source))
    apart = [snippets[:: max(1, len(snippets) // each)] for _, snippets in sorted(by_source.items())]
    chosen = [snippet for snippet in chain.from_iterable(zip_longest(*apart)) if snippet is not None][:num_clips]
    names = ArrayNames(keypoints_mode="optional")
    spec, _, bad = check_headers(home.path, chosen, names)
    if bad:
        raise InputError(f"{home.path}: {bad[0]}. Measure on snippets that `python -m convert pack` takes.")
    return chosen, Recipe("jpeg", {"quality": quality}, spec, spec, names, ())


@dataclass(frozen=True)
class _Member:
    """An array of a snippet as it lies in the npz; its values begin at `data_offset` of the inflated bytes."""

    blob: bytes
    num_bytes: int
    data_offset: int
    crc32: int
    is_video: bool


def _members(path: Path, names: ArrayNames) -> list[_Member]:
    """The deflated arrays that `pack` takes; raises InputError for one that is not deflated: there is nothing to inflate."""
    headers = read_headers(path)
    members = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in (names.video, names.keypoints):
                if info.compress_type != zipfile.ZIP_DEFLATED:
                    raise InputError(f"{path}: '{name}' is not compressed; expected a file of np.savez_compressed.")
                file.seek(info.header_offset + 26)
                file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
                members.append(_Member(file.read(info.compress_size), info.file_size, headers[name].data_offset, info.CRC, name == names.video))
    return members


def _inflate(name: str) -> Inflate | None:
    """None where its library is not installed."""
    module, made = INFLATES[name]
    try:
        return made(importlib.import_module(module))
    except ModuleNotFoundError:
        return None


def _inflate_all(members: Sequence[Sequence[_Member]], inflate: Inflate) -> None:
    for clip in members:
        for member in clip:
            inflate(member.blob, member.num_bytes)


def _load_all(home: Home, chosen: Sequence[Snippet], names: ArrayNames) -> None:
    for snippet in chosen:
        _load(home.path / snippet.path, names)


def _load(path: Path, names: ArrayNames) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in (names.video, names.keypoints) if name in arrays.files}


def _floor(members: Sequence[Sequence[_Member]], inflate: Inflate, recipe: Recipe) -> None:
    codec = make_codec(recipe.codec, recipe.codec_settings)
    for clip in members:
        for member in clip:
            inflated = inflate(member.blob, member.num_bytes)
            if isal_zlib.crc32(inflated) != member.crc32:
                raise RuntimeError("an inflated member has another crc32")
            hashlib.sha256(memoryview(inflated)[member.data_offset :]).digest()
            if member.is_video:
                for frame in np.frombuffer(inflated, np.uint8, offset=member.data_offset).reshape(recipe.source.video_shape):
                    codec.encode(frame)


def _ours(home: Home, chosen: Sequence[Snippet], recipe: Recipe, folder: Path) -> None:
    (folder / "train").mkdir(exist_ok=True)
    codec = make_codec(recipe.codec, recipe.codec_settings)
    write_shard(folder, "train", "train-000000", "a plan", (encode_clip(home.path, snippet, recipe, codec) for snippet in chosen))


def _plain(home: Home, chosen: Sequence[Snippet], recipe: Recipe, folder: Path) -> None:
    """What one would write first, with our encoder, hashes and points."""
    codec = make_codec(recipe.codec, recipe.codec_settings)
    with webdataset.ShardWriter(f"{folder}/plain-%06d.tar", maxcount=len(chosen), verbose=0) as writer:
        for snippet in chosen:
            arrays = _load(home.path / snippet.path, recipe.names)
            video, mask = arrays[recipe.names.video], arrays.get(recipe.names.keypoints)
            frames = [codec.encode(frame) for frame in video]
            sha256 = {name: hashlib.sha256(array.data).hexdigest() for name, array in arrays.items()}
            sample = {
                "__key__": snippet.key,
                "cls": snippet.label,
                "frames.mp": {"codec": codec.name, "shape": video.shape, "frames": frames, "crc32": [zlib.crc32(frame) for frame in frames]},
                "json": {"path": snippet.path, "source": snippet.source, "sha256": sha256},
            }
            if mask is not None:
                sample["keypoints.mp"] = {"shape": mask.shape, "points": np.argwhere(mask).astype("<u2").tobytes()}
            writer.write(sample)


def _worker_memory(home: Home, chosen: Sequence[Snippet], recipe: Recipe, num_clips: int) -> tuple[int, float, float]:
    """The clips of the largest shard, MB of a worker of `pack` with imports alone, and the most that packing adds."""
    codec, many_mib = make_codec(recipe.codec, recipe.codec_settings), 2**20
    clip_mib = many_mib / clips_per_shard(codec, recipe.stored, 0, many_mib)
    with tempfile.TemporaryDirectory() as folder:
        linked = Path(folder, "home")
        for snippet in chosen:
            link = linked / snippet.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(home.path / snippet.path)
        arguments = [linked, Path(folder, "shards"), recipe.codec_settings["quality"], (num_clips + 0.5) * clip_mib]
        root = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", PACK_IN_A_WORKER, *map(str, arguments)], capture_output=True, text=True, cwd=root, check=False)
    if done.returncode:
        raise InputError(f"{home.path}: packing it in a process of its own failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    imports_kib, peak_kib, most_clips = json.loads(done.stdout.splitlines()[-1])
    return most_clips, imports_kib * 1024 / 1e6, (peak_kib - imports_kib) * 1024 / 1e6


def _show(
    recipe: Recipe,
    fastest: str,
    inflating: Measured,
    cpu_ms: Measured,
    clips_per_s: Measured,
    ratios: Measured,
    memory: Sequence[tuple[int, float, float]],
) -> None:
    print(table(["inflate both arrays", "CPU ms/clip"], [[name, cell(values, 1)] for name, values in inflating.items()]))
    print("".join(f"{name}: not installed, left out\n" for name in INFLATES if name not in inflating))
    print(table(["convert on one core", "CPU ms/clip", "clips/s"], [[name, cell(cpu_ms[name], 1), cell(clips_per_s[name], 1)] for name in cpu_ms]))
    print(f"the floor inflates by {fastest}\n")
    print(table(["CPU time", f"ratio, n = {len(cpu_ms['ours'])}"], [[name, cell(values, 2)] for name, values in ratios.items()]) + "\n")
    clip_mb = (math.prod(recipe.source.video_shape) + math.prod(recipe.source.mask_shape)) / 1e6
    rows = [[f"{clips} clips a shard", f"{imports:.0f} MB", f"{above:.0f} MB", f"{above / clip_mb:.1f}"] for clips, imports, above in memory]
    print(table(["peak memory of a worker", "imports", "above them", f"clips of {clip_mb:.0f} MB"], rows))
