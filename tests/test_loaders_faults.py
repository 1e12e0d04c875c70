"""Damaged and missing files: an error that names shard, clip, member and offset, and never a wrong clip."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from clips.codecs import make_codec
from clips.errors import ClipError, InputError
from clips.format import pack_index
from clips.manifest import index_path, read_index, read_manifest
from loaders.plan import Plan
from loaders.source import open_source, splits_of
from loaders.stream import Loader, LoaderConfig
from tests.loading import CROP, MANY_SHARDS_MIB, SEED, STORED, assert_same, by_key, find_entry, flip_byte, keys_in, keys_of, npz_home, opened, shards


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def packed(base: Path, tmp_path: Path) -> Path:
    """Shards of its own for a test to damage."""
    return Path(shutil.copytree(shards(base, "zstd", MANY_SHARDS_MIB), tmp_path / "shards"))


@pytest.fixture
def snippets(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(npz_home(base), tmp_path / "snippets"))


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize("frame", [0, 4, 6])
def test_a_flipped_byte_in_a_frame_names_shard_clip_member_offset_and_frame(packed: Path, frame: int) -> None:
    key = keys_of_shards(packed)[6]
    path, entry = find_entry(packed, key)
    flip_byte(path, int(entry.frames["offset"][frame]) + 11)
    expected = (
        f"{path}: clip '{key}', member frames.mp at offset {entry.members['frames.mp'][0]}: frame {frame} has another crc32 than the index promises. "
        "Run python -m convert verify on its folder."
    )
    with opened(packed) as made, pytest.raises(ClipError, match=exactly(expected)):
        for batch in made.evaluation():
            assert key not in batch.key


def test_damage_to_a_frame_that_is_not_chosen_disturbs_nobody(packed: Path) -> None:
    with opened(packed) as made:
        whole = by_key(made.evaluation())
        key = next(fact.key for fact in made.source.facts if fact.frames_valid == 9)
        path, entry = find_entry(packed, key)
        for frame in (1, 3, 5, 7):  # five of nine: 0, 2, 4, 6, 8
            flip_byte(path, int(entry.frames["offset"][frame]))
        assert_same(by_key(made.evaluation()), whole)


def keys_of_shards(home: Path) -> list[str]:
    source = open_source(home, "train")
    source.close()
    return [fact.key for fact in source.facts]


def test_the_batches_before_a_damaged_clip_come_first_and_the_loader_can_start_again(packed: Path) -> None:
    with opened(packed) as made:
        whole = by_key(made.training(0))
        key = list(whole)[10]
        path, entry = find_entry(packed, key)
        for frame in range(STORED.frames):
            flip_byte(path, int(entry.frames["offset"][frame]))
        seen: list[str] = []
        with pytest.raises(ClipError, match=key):
            for batch in made.training(0):
                seen += batch.key
        assert seen == list(whole)[:10]
        for frame in range(STORED.frames):
            flip_byte(path, int(entry.frames["offset"][frame]))
        assert_same(by_key(made.training(0)), whole)


@pytest.mark.parametrize(
    ("codec", "blob", "reason"),
    [
        ("zstd", b"no zstandard at all", "frame 4 does not decode"),
        ("zstd", "small", "frame 4 does not decode.* bytes where a frame of 2304 was promised"),
        ("jpeg", b"no picture at all", "frame 4 does not decode"),
        ("jpeg", "small", "frame 4 does not decode.*16x16 pixels where 24x32 were promised"),
        ("jpeg", "large", "frame 4 does not decode.*48x64 pixels where 24x32 were promised"),
    ],
)
def test_a_frame_with_the_right_checksum_that_is_no_such_frame_is_an_error(base: Path, tmp_path: Path, codec: str, blob: bytes | str, reason: str) -> None:
    home = Path(shutil.copytree(shards(base, codec, MANY_SHARDS_MIB), tmp_path / "shards"))
    key = keys_of_shards(home)[3]
    if isinstance(blob, str):
        size = {"small": (16, 16), "large": (48, 64)}[blob]
        blob = make_codec(codec).encode(np.zeros((*size, 3), np.uint8))
    path, _ = find_entry(home, key)
    put_frame(home, path, key, 4, blob)
    with opened(home) as made, pytest.raises(ClipError, match=f"{re.escape(str(path))}: clip '{key}', member frames.mp at offset .*{reason}"):
        list(made.evaluation())


def put_frame(home: Path, path: Path, key: str, frame: int, blob: bytes) -> None:
    """Writes `blob` at the end of the shard and makes index and manifest promise it as that frame and those after it."""
    index_file = index_path(home, "train", path.stem)
    manifest = json.loads((home / "manifest.json").read_text())
    (promise,) = (shard for shard in manifest["splits"]["train"]["shards"] if shard["name"] == path.stem)
    index = read_index(home, "train", next(s for s in read_manifest(home).splits["train"].shards if s.name == path.stem))
    clips = []
    for entry in index.clips:
        frames = entry.frames.copy()
        if entry.facts.key == key:
            frames[frame:] = (path.stat().st_size, len(blob), zlib.crc32(blob))
        clips.append(replace(entry, frames=frames))
    with path.open("ab") as file:
        file.write(blob)
    index_file.write_bytes(pack_index(replace(index, clips=tuple(clips))))
    promise["index_sha256"] = sha256(index_file.read_bytes()).hexdigest()
    promise["tar_bytes"] = path.stat().st_size
    (home / "manifest.json").write_text(json.dumps(manifest))


def test_a_shard_cut_short_under_an_open_loader_is_an_error_and_does_not_end_the_process(packed: Path) -> None:
    with opened(packed) as made:
        keys = keys_in(made.evaluation())
        path, entry = find_entry(packed, keys[9])
        os.truncate(path, int(entry.frames["offset"][4]) + 3)
        with pytest.raises(ClipError, match=rf"{re.escape(str(path))}: clip '.*', member .* at offset \d+: \d+ of \d+ bytes could be read"):
            list(made.evaluation())


def test_an_index_that_changed_is_an_error_at_open(packed: Path) -> None:
    path = packed / "train" / "train-000001.index.mp"
    flip_byte(path, 40)
    with pytest.raises(ClipError, match=f"{re.escape(str(path))}: sha256 is not the manifest's"):
        open_source(packed, "train")


@pytest.mark.parametrize("suffix", ["index.mp", "tar"])
def test_a_missing_file_is_an_error_at_open(packed: Path, suffix: str) -> None:
    path = packed / "train" / f"train-000002.{suffix}"
    path.unlink()
    with pytest.raises(ClipError, match=rf"{re.escape(str(path))}: cannot be .*No such file.*convert verify"):
        open_source(packed, "train")


@pytest.mark.parametrize("change", [-1, 1, 4096])
def test_a_shard_of_another_size_is_an_error_at_open(packed: Path, change: int) -> None:
    path = packed / "train" / "train-000000.tar"
    size = path.stat().st_size
    os.truncate(path, size + change)
    expected = f"{path}: {size + change} bytes; the manifest promises {size}. Copy it again, or run python -m convert verify."
    with pytest.raises(ClipError, match=exactly(expected)):
        open_source(packed, "train")


@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
def test_a_snippet_damaged_under_an_open_loader_names_file_and_clip(snippets: Path, damage: str) -> None:
    key = keys_of(snippets)[5]
    path = snippets / f"{key}.npz"
    with opened(snippets) as made:
        if damage == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif damage == "flipped":
            flip_byte(path, path.stat().st_size // 3)
        else:
            path.unlink()
        with pytest.raises(ClipError, match=f"{re.escape(str(path))}: clip '{key}': "):
            list(made.evaluation())


def test_a_snippet_cut_short_before_is_listed_at_open(snippets: Path) -> None:
    path = next((snippets / "train").rglob("*.npz"))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=f"1 of 21 snippets cannot be used:\n  {re.escape(path.relative_to(snippets).as_posix())}: not a whole npz"):
        open_source(snippets, "train")


@pytest.mark.parametrize("kind", ["packed", "snippets"])
def test_a_missing_split_is_an_error_that_lists_those_there(kind: str, request: pytest.FixtureRequest) -> None:
    home = request.getfixturevalue(kind)
    assert splits_of(home) == ["train", "val"]
    with pytest.raises(InputError, match=f"--dataset-home {re.escape(str(home))}: .*split test.* train, val"):
        open_source(home, "test")


def test_an_unknown_loader_is_an_error_that_offers_the_nearest(packed: Path) -> None:
    with pytest.raises(InputError, match=r"--loader webdatset: unknown; expected one of .*npz.*\. Did you mean webdataset\?"):
        open_source(packed, "train", "webdatset")
    with pytest.raises(InputError, match=r"--loader npy: unknown.*Did you mean npz\?"):
        LoaderConfig(packed, loader="npy")


def test_a_loader_for_the_other_kind_of_folder_is_an_error_that_names_the_folder(packed: Path, snippets: Path) -> None:
    with pytest.raises(InputError, match=f"{re.escape(str(snippets))}.*npz snippets: pack them first"):
        open_source(snippets, "train", "webdataset")
    with pytest.raises(InputError, match=f"--loader npz: {re.escape(str(packed))} holds shards"):
        open_source(packed, "train", "npz")


def test_a_folder_that_is_missing_or_empty_is_an_error(tmp_path: Path) -> None:
    for home, reason in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "neither shards .* nor snippets")):
        with pytest.raises(InputError, match=f"--dataset-home {re.escape(str(home))}: {reason}"):
            splits_of(home)


@pytest.mark.parametrize(("wrong", "flag"), [({"threads": 0}, "--threads 0"), ({"prefetch": 0}, "--prefetch 0")])
def test_a_loader_without_threads_or_prefetch_is_an_error(tmp_path: Path, wrong: dict[str, int], flag: str) -> None:
    with pytest.raises(InputError, match=flag):
        LoaderConfig(tmp_path, **wrong)  # type: ignore[arg-type]  # all of these fields are numbers


def test_a_plan_of_another_number_of_clips_is_refused(packed: Path) -> None:
    source = open_source(packed, "train")
    with pytest.raises(ValueError, match="a plan of 20 clips for 21"):
        Loader(source, Plan(20, 4, 2, SEED), CROP, torch.device("cpu"), 1)
    source.close()
