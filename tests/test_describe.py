"""describe: what it tells is what lies in the folders, counted here from file names, file sizes and the npz."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clips.errors import ClipError, InputError
from clips.format import pack_index
from clips.manifest import index_path, read_index, read_manifest, write_manifest
from convert.describe import DescribeConfig, describe, table
from convert.pack import PackConfig, pack
from convert.verify import VerifyConfig, verify
from tests.making import write_home
from tests.packing import rewrite, snippets_of, source_of, use_threads

COUNTS = {"train": {"nongesture": 9, "gesture": 4}, "val": {"nongesture": 1, "gesture": 2}, "test": {"nongesture": 2}}
FRAMES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with padded clips and a gap in one source's numbers, packed as JPEGs of half the size, without its flow pictures."""
    folder = tmp_path_factory.mktemp("described")
    home = write_home(folder, COUNTS, FRAMES, 32, 48, padded_every=5)
    rewrite(snippets_of(home)[0], video_OF=np.zeros((FRAMES, 2), np.uint8))
    (home / "train/nongesture/000000002_train_nongesture_000.npz").unlink()
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_threads(monkeypatch)
        pack(PackConfig(home, folder / "shards", quality=95, store_size=16, shard_mib=0.05, extras="drop", workers=2))
    yield folder


def home_of(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith("ellen"))


def facts_of(shards: Path, output: Path) -> dict[str, Any]:
    assert describe(DescribeConfig(shards, output)) == 0
    facts: dict[str, Any] = json.loads(output.read_text())
    return facts


def valid_frames(path: Path) -> int:
    with np.load(path) as arrays:
        return 1 + max(t for t in range(FRAMES) if arrays["video"][t].any())


def test_counts_are_those_of_the_home(folder: Path, tmp_path: Path) -> None:
    facts, home = facts_of(folder / "shards", tmp_path / "facts.json"), home_of(folder)
    assert list(facts["splits"]) == ["train", "val", "test"]
    for split, told in [*facts["splits"].items(), ("*", facts["all"])]:
        files = sorted(home.glob(f"{split}/*/*.npz"))
        assert told["clips"] == len(files)
        assert told["sources"] == len({path.stem.split("_", 1)[1] for path in files})
        assert list(told["classes"]) == ["nongesture", "gesture"]
        for name, group in told["classes"].items():
            members = [path for path in files if path.parent.name == name]
            assert group == {"clips": len(members), "sources": len({path.stem.split("_", 1)[1] for path in members})}
        valid = [valid_frames(path) for path in files]
        assert told["frames_valid"] == {str(number): valid.count(number) for number in sorted(set(valid))}
        assert told["padded"] == sum(number < FRAMES for number in valid)
        assert told["with_keypoints"] == len(files)
        assert told["left_out"] == []
    assert facts["splits"]["train"]["with_times"] == 12 - 3  # the source with the gap has three clips left
    assert facts["splits"]["val"]["with_times"] == 3
    assert facts["leaks"] == {"identical": [], "sources": {}, "near": None}


def test_sizes_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    facts = facts_of(folder / "shards", tmp_path / "facts.json")
    assert facts["raw_clip_bytes"] == source_of(home_of(folder), "val/nongesture/000000000_val_nongesture_000")["video"].nbytes
    for split, told in [*facts["splits"].items(), ("*", facts["all"])]:
        tars = [path.stat().st_size for path in (folder / "shards").glob(f"{split}/*.tar")]
        assert (told["shards"], told["tar_bytes"]) == (len(tars), sum(tars))
        assert told["clip_bytes"] == round(sum(tars) / told["clips"])
        assert told["share_of_raw"] == pytest.approx(sum(tars) / told["clips"] / (FRAMES * 32 * 48 * 3), abs=1e-6)
        assert 0 < told["frame_bytes"] < sum(tars)
    assert facts["splits"]["train"]["shards"] > 1


def test_the_manifest_and_the_indexes_are_enough(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards", ignore=shutil.ignore_patterns("*.tar"))
    facts, others = (facts_of(shards, tmp_path / "facts.json") for shards in (tmp_path / "shards", folder / "shards"))
    assert facts | {"folder": ""} == others | {"folder": ""}


def test_a_reader_learns_codec_geometry_arrays_and_the_homes_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(DescribeConfig(folder / "shards")) == 0
    told = capsys.readouterr().out
    for line in [
        "  length 1300: a snippet is 1300 ms of its source: 8 frames, 6.2 a second",
        "  sample rate 1: every frame of the source was kept",
        "  IoU 0.55: the share of a snippet that must meet an annotation",
        "  codec jpeg, quality 95: lossy",
        "  frames 8x16x24, made smaller from 8x32x48; raw video 0.0 MB a clip",
        "  arrays: frames from 'video', keypoints from 'keypoints' (required); others kept: none, dropped: video_OF",
        "frames_valid in train: 9 whole (8 frames), 3 padded: 3 with 6-7",
        "frames_valid in test: all 2 clips are whole (8 frames)",
    ]:
        assert line in told.splitlines(), told
    assert told.startswith("ellen_show_length_1300_sample_rate_1_iou_0.55\n")


def test_tables_are_aligned_and_hold_the_facts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(folder / "shards", tmp_path / "facts.json")
    blocks = capsys.readouterr().out.split("\n\n")
    classes, sizes = (block.splitlines() for block in blocks[1:3])
    assert classes[0].split() == ["split", "class", "clips", "sources"]
    assert [line.split() for line in classes[1:4]] == [["train", "nongesture", "8", "3"], ["gesture", "4", "2"], ["together", "12", "5"]]
    assert len({len(line) for line in classes}) == 1 == len({len(line) for line in sizes})
    rows = {line.split()[0]: line.split()[1:] for line in sizes[1:]}
    assert list(rows) == ["train", "val", "test", "all"]
    for split, told in [*facts["splits"].items(), ("all", facts["all"])]:
        shards, megabytes, per_clip, share, *rest = rows[split]
        assert shards == str(told["shards"])
        assert float(megabytes) == pytest.approx(told["tar_bytes"] / 1e6, abs=0.051)
        assert float(per_clip) == pytest.approx(told["clip_bytes"] / 1e6, abs=0.0006)
        assert float(share.removesuffix("%")) == pytest.approx(100 * told["share_of_raw"], abs=0.06)
        assert rest == [str(told[name]) for name in ("padded", "with_times", "with_keypoints")] + ["0"]


def test_padded_clips_are_counted_by_quarters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    home = write_home(tmp_path, {"val": {"a": 6}}, FRAMES, 16, 16)
    for path, valid in zip(snippets_of(home), (1, 2, 3, 5, 7, 8), strict=True):
        video = source_of(home, path.relative_to(home).as_posix().removesuffix(".npz"))["video"]
        video[valid:] = 0
        video[0] = 7
        rewrite(path, video=video)
    use_threads(monkeypatch)
    pack(PackConfig(home, tmp_path / "shards", workers=1))
    values = facts_of(tmp_path / "shards", tmp_path / "facts.json")["splits"]["val"]
    assert values["frames_valid"] == {str(number): 1 for number in (1, 2, 3, 5, 7, 8)}
    assert values["with_constant_frames"] == 6
    told = capsys.readouterr().out
    assert "frames_valid in val: 1 whole (8 frames), 5 padded: 1 with 1, 2 with 2-3, 1 with 4-5, 1 with 6-7\n" in told
    assert "frames of one colour in val: 6 clips\n" in told


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("show_length_2600_sample_rate_2_iou_0.5", ["2600 ms of its source: 8 frames, 3.1 a second", "one of 2 frames of the source was kept", "IoU 0.5"]),
        ("show_length_1300_iou_thr_0.7", ["1300 ms of its source", "IoU 0.7"]),
        ("snippets", ["the home's name does not tell length, sample rate and IoU"]),
    ],
)
def test_the_homes_name_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, expected: list[str]
) -> None:
    home = write_home(tmp_path, {"val": {"a": 2}}, FRAMES, 16, 16, name=name)
    use_threads(monkeypatch)
    pack(PackConfig(home, tmp_path / "shards", codec="zstd", keypoints="none", workers=1))
    facts = facts_of(tmp_path / "shards", tmp_path / "facts.json")
    told = capsys.readouterr().out
    assert all(part in told for part in expected)
    assert ("sample rate" in told) == ("sample_rate" in name or name == "snippets")
    assert facts["home"]["folder"] == name and facts["lossless"] and "codec zstd, level 1: bit-exact" in told
    values = facts["splits"]["val"]
    assert (values["with_times"], values["with_keypoints"]) == (0 if name == "snippets" else 2, 0)
    assert not re.search("^all ", told, re.MULTILINE)  # one split needs no sum


def test_the_psnr_is_that_of_the_last_verify_and_of_these_shards_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path / "npz", {"train": {"gesture": 2, "nongesture": 2}, "val": {"gesture": 1, "nongesture": 1}})
    pack(PackConfig(home, tmp_path / "lossy"))
    pack(PackConfig(home, tmp_path / "exact", codec="zstd"))
    assert describe(DescribeConfig(tmp_path / "lossy")) == 0
    assert "PSNR: not measured; python -m convert verify SHARDS --dataset-home HOME" in capsys.readouterr().out
    for name in ("lossy", "exact"):
        assert verify(VerifyConfig(tmp_path / name, home)) == 0
    worst = float(re.findall(r"frames lossy \(min ([\d.]+) dB", capsys.readouterr().out)[0])
    assert describe(DescribeConfig(tmp_path / "lossy", json=tmp_path / "facts.json")) == 0
    found = json.loads((tmp_path / "facts.json").read_text())["quality"]
    assert found.keys() == {"train", "val"} and min(split["psnr_min_db"] for split in found.values()) == pytest.approx(worst, abs=0.06)
    assert f"PSNR in train: min {found['train']['psnr_min_db']:.1f} dB" in capsys.readouterr().out
    assert describe(DescribeConfig(tmp_path / "exact")) == 0
    assert "PSNR in val: equal, bit for bit over 2 clips" in capsys.readouterr().out
    (tmp_path / "exact" / "verified.json").replace(tmp_path / "lossy" / "verified.json")
    assert describe(DescribeConfig(tmp_path / "lossy")) == 0
    assert "PSNR: not measured" in capsys.readouterr().out


def test_a_source_and_a_clip_in_two_splits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    home = write_home(tmp_path, {"train": {"a": 2}, "test": {"a": 1}}, 2, 8, 8)
    (file,) = (home / "test/a").iterdir()
    file.rename(file.with_name("000000009_train_a_000.npz"))
    rewrite(home / "test/a/000000009_train_a_000.npz", video=source_of(home, "train/a/000000001_train_a_000")["video"])
    use_threads(monkeypatch)
    pack(PackConfig(home, tmp_path / "shards", workers=1))
    facts = facts_of(tmp_path / "shards", tmp_path / "facts.json")
    assert facts["leaks"]["sources"] == {"train_a_000": ["test", "train"]}
    told = capsys.readouterr().out
    assert "in more than one split: 1 sources (train_a_000)\n" in told
    assert "in more than one split: 1 clips with equal bytes (test/a/000000009_train_a_000 = train/a/000000001_train_a_000)\n" in told
    assert facts["all"]["sources"] == 1


def test_snippets_left_out_are_told_with_their_reasons(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    manifest = read_manifest(tmp_path / "shards")
    bad = tuple({"path": f"val/gesture/{number}.npz", "reason": "cut short"} for number in range(7))
    (shard,) = manifest.splits["val"].shards
    index = pack_index(replace(read_index(tmp_path / "shards", "val", shard), bad=bad[2:]))
    index_path(tmp_path / "shards", "val", shard.name).write_bytes(index)
    entry = replace(manifest.splits["val"], bad=bad, shards=(replace(shard, index_sha256=hashlib.sha256(index).hexdigest()),))
    write_manifest(tmp_path / "shards", replace(manifest, splits=manifest.splits | {"val": entry}))
    facts = facts_of(tmp_path / "shards", tmp_path / "facts.json")
    assert facts["splits"]["val"]["left_out"] == list(bad) == facts["all"]["left_out"]
    told = capsys.readouterr().out
    assert "left out of val: val/gesture/4.npz: cut short\nleft out of val: 2 more\n" in told
    assert re.search(r"^val .* 7$", told, re.MULTILINE)


def test_the_json_is_the_same_for_the_same_shards(folder: Path, tmp_path: Path) -> None:
    facts_of(folder / "shards", tmp_path / "a.json")
    facts_of(folder / "shards", tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_what_cannot_be_read_or_written_is_an_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"manifest\.json: missing"):
        describe(DescribeConfig(tmp_path))
    with pytest.raises(InputError, match=r"--json .*nowhere does not exist"):
        describe(DescribeConfig(folder / "shards", tmp_path / "nowhere" / "facts.json"))
    with pytest.raises(InputError, match="is a folder"):
        describe(DescribeConfig(folder / "shards", tmp_path))
    assert capsys.readouterr().out == ""
    shutil.copytree(folder / "shards", tmp_path / "shards")
    path = index_path(tmp_path / "shards", "val", "val-000000")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ClipError, match=r"val-000000\.index\.mp: sha256 is not the manifest's"):
        describe(DescribeConfig(tmp_path / "shards"))


def test_tables_put_words_left_and_numbers_right() -> None:
    assert table(["a", "n"], [["long", "1"], ["x", "100"]], left=1) == ["a       n", "long    1", "x     100"]
