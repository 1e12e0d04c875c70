"""verify: clean shards pass with the right verdict, and damaged files and changed snippets are found and named."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clips.errors import InputError
from clips.manifest import index_path, tar_path
from convert.members import psnr_db
from convert.pack import PackConfig, pack
from convert.verify import VerifyConfig, verify
from tests.making import write_home
from tests.packing import rewrite, snippets_of, use_threads
from tests.verifying import Check, assert_finds, home_of

# --- clean


def test_whole_lossless_shards_are_bit_exact(check: Check) -> None:
    assert check() == (0, "8 clips in 4 shards checked, 0 problems\nbit-exact: npz can be rebuilt\n", "")


def test_whole_lossy_shards_say_how_lossy(check: Check) -> None:
    code, out, log = check("jpeg")
    assert code == 0 and "low quality" not in log and log.count(" dB: '") == 8  # the ten worst, of eight
    first, last = out.splitlines()
    assert first == "8 clips in 5 shards checked, 0 problems" or first.endswith(" shards checked, 0 problems")
    assert last.startswith("frames lossy (min ") and last.endswith(" dB): keep the npz or pack zstd")
    least, mean = (float(word) for word in last.replace("(", " ").split() if word.replace(".", "").isdigit())
    assert 35 < least <= mean < 60


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_without_the_npz_only_wholeness_is_promised(codec: str, check: Check) -> None:
    code, out, _ = check(codec, with_home=False)
    assert code == 0
    assert out.splitlines()[-1] == "whole: as packed. Whether it equals the npz: python -m convert verify --dataset-home"


def test_the_verdict_names_what_was_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 1}}, frames=2, height=8, width=8)
    rewrite(snippets_of(home)[0], fps=np.array(29.97), flow=np.arange(3))
    base = PackConfig(home, tmp_path, codec="zstd", workers=1)
    for name, config, last in [
        ("kept", replace(base, extras="keep"), "bit-exact: npz can be rebuilt"),
        ("dropped", replace(base, extras="drop"), "bit-exact: npz can be rebuilt; not packed: flow, fps"),
        ("none", replace(base, extras="keep", keypoints="none"), "bit-exact: npz can be rebuilt; not packed: keypoints, where there was one"),
    ]:
        pack(replace(config, output=tmp_path / name))
        assert verify(VerifyConfig(tmp_path / name, home, workers=1)) == 0
        assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_clip_that_jpeg_keeps_exactly_spoils_no_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 2}}, frames=2)
    rewrite(snippets_of(home)[0], video=np.full((2, 32, 32, 3), 128, np.uint8))
    pack(PackConfig(home, tmp_path / "out", quality=97, workers=1))
    assert verify(VerifyConfig(tmp_path / "out", home, workers=1)) == 0
    assert "inf" not in capsys.readouterr().out


def test_low_quality_is_said_and_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 12}}, frames=2)
    pack(PackConfig(home, tmp_path / "out", quality=3, workers=1))
    caplog.set_level(logging.INFO)
    assert verify(VerifyConfig(tmp_path / "out", home, workers=1)) == 0
    lines = [record.message for record in caplog.records if "low quality" in record.message]
    assert len(lines) == 11 and lines[-1] == "low quality: 12 clips below 35 dB; take a higher --quality or --codec zstd"
    worst = [float(line.split(" dB: ")[0]) for line in lines[:10]]
    assert worst == sorted(worst) and len({line.split("'")[1] for line in lines[:10]}) == 10


def test_psnr_is_the_textbooks() -> None:
    chance = np.random.RandomState(0)
    a, b = chance.randint(0, 256, (2, 3, 9, 7, 3)).astype(np.uint8)
    mean_square = np.mean((a.astype(np.float64) - b) ** 2)
    assert psnr_db(a, b) == pytest.approx(10 * np.log10(255**2 / mean_square), abs=1e-4)
    assert psnr_db(a, a) == np.inf
    assert psnr_db(np.zeros_like(a), np.full_like(a, 255)) == pytest.approx(0, abs=1e-6)


# --- damaged files


def flip(path: Path, place: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(blob)


def test_a_flipped_byte_anywhere_in_a_tar_is_found(packed: Path, check: Check) -> None:
    path = tar_path(packed / "zstd", "train", "train-000000")
    size = path.stat().st_size
    for place in (0, 156, 511, 512, 3000, size // 2, size - 1):  # name, type, header, data, frames, padding at the end
        flip(path, place)
        assert_finds(check, "train-000000.tar: sha256 is not the manifest's")
        flip(path, place)
    assert check(with_home=False)[0] == 0


def test_a_flipped_byte_anywhere_in_an_index_is_found(packed: Path, check: Check) -> None:
    path = index_path(packed / "zstd", "train", "train-000001")
    size = path.stat().st_size
    for place in (0, size // 3, size - 1):
        flip(path, place)
        assert_finds(check, "train-000001.index.mp: sha256 is not the manifest's")
        flip(path, place)
    assert check(with_home=False)[0] == 0


@pytest.mark.parametrize("length", [0, 100, 512, 5000, -1])
def test_a_tar_cut_short_is_found(length: int, packed: Path, check: Check) -> None:
    path = tar_path(packed / "zstd", "val", "val-000000")
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    assert_finds(check, "val-000000.tar: sha256 is not the manifest's")


def test_bytes_after_a_tar_are_found(packed: Path, check: Check) -> None:
    path = tar_path(packed / "zstd", "val", "val-000000")
    path.write_bytes(path.read_bytes() + b"\0")
    assert_finds(check, "val-000000.tar: sha256 is not the manifest's")


@pytest.mark.parametrize("name", ["train/train-000001.tar", "train/train-000001.index.mp"])
def test_a_missing_file_is_found(name: str, packed: Path, check: Check) -> None:
    (packed / "zstd" / name).unlink()
    assert_finds(check, f"{packed / 'zstd' / name}: cannot be read (No such file or directory).")


@pytest.mark.parametrize("name", ["train/train-000099.tar", "train/other.tar", "val/train-000000.tar"])
def test_a_stranger_is_found(name: str, packed: Path, check: Check) -> None:
    shutil.copy(packed / "zstd/train/train-000000.tar", packed / "zstd" / name)
    assert_finds(check, f"{packed / 'zstd' / name}: not in the manifest.")


def test_a_stranger_in_a_folder_of_no_packed_split_is_found(packed: Path, check: Check) -> None:
    (packed / "zstd/test").mkdir()
    shutil.copy(packed / "zstd/train/train-000000.tar", packed / "zstd/test/test-000000.tar")
    assert_finds(check, "test-000000.tar: not in the manifest.")


@pytest.mark.parametrize("suffixes", [(".tar",), (".tar", ".index.mp")])
def test_two_shards_exchanged_are_found(suffixes: tuple[str, ...], packed: Path, check: Check) -> None:
    folder = packed / "zstd/train"
    for suffix in suffixes:
        one, two = folder / f"train-000000{suffix}", folder / f"train-000001{suffix}"
        one.rename(folder / "aside")
        two.rename(one)
        (folder / "aside").rename(two)
    code, _out, log = check(with_home=False)
    assert code == 1 and "train-000000" in log and "train-000001" in log


def test_all_damage_is_listed_at_once(packed: Path, check: Check) -> None:
    flip(tar_path(packed / "zstd", "train", "train-000000"), 5000)
    index_path(packed / "zstd", "train", "train-000001").unlink()
    shutil.copy(packed / "zstd/train/train-000002.tar", packed / "zstd/val/more.tar")
    code, out, log = check(with_home=False)
    assert code == 1 and out.splitlines()[0].endswith(" 3 problems")
    assert all(name in log for name in ("train-000000.tar", "train-000001.index.mp", "more.tar"))


def test_a_folder_without_a_manifest_and_a_missing_folder_are_refused(packed: Path, check: Check) -> None:
    (packed / "zstd/manifest.json").unlink()
    for folder in (packed / "zstd", packed / "nowhere"):
        with pytest.raises(InputError, match=r"manifest.json: missing; expected shards that were packed to the end"):
            verify(VerifyConfig(folder))


# --- the source changed


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
@pytest.mark.parametrize("array", ["video", "keypoints"])
def test_a_changed_npz_is_found(array: str, codec: str, packed: Path, check: Check) -> None:
    path = snippets_of(home_of(packed) / "train")[1]
    with np.load(path) as arrays:
        changed = arrays[array].copy()
    changed[0, 0, 0] = 1 - changed[0, 0, 0] if array == "keypoints" else changed[0, 0, 0] ^ 1  # one pixel, one step
    rewrite(path, **{array: changed})
    key = path.relative_to(home_of(packed)).as_posix().removesuffix(".npz")
    assert_finds(check, f"clip '{key}': its npz changed since it was packed: {array}", codec, with_home=True)


def test_a_kept_array_that_changed_in_the_npz_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    use_threads(monkeypatch)
    home = write_home(tmp_path, {"train": {"a": 1}}, frames=2, height=8, width=8)
    rewrite(snippets_of(home)[0], fps=np.array(29.97))
    pack(PackConfig(home, tmp_path / "out", codec="zstd", extras="keep", workers=1))
    rewrite(snippets_of(home)[0], fps=np.array(25.0))
    assert verify(VerifyConfig(tmp_path / "out", home, workers=1)) == 1
    assert "its npz changed since it was packed: fps" in caplog.text


def test_a_snippet_moved_to_another_class_is_found(packed: Path, check: Check) -> None:
    path = snippets_of(home_of(packed) / "train/gesture")[0]
    path.rename(home_of(packed) / "train/nongesture" / path.name)
    assert_finds(check, f"clip 'train/gesture/{path.stem}': its npz is not in {home_of(packed)}", with_home=True)


def test_a_removed_a_broken_and_an_added_snippet_are_found(packed: Path, check: Check) -> None:
    first, second = snippets_of(home_of(packed) / "train")[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    assert_finds(check, "its npz cannot be read: not a whole npz", with_home=True)
    first.unlink()
    assert_finds(check, "its npz is not in", with_home=True)
    first.write_bytes(whole)
    shutil.copy(second, second.with_name("999999999_more.npz"))
    assert_finds(check, "train: the home holds 7 snippets and the shards 6 clips.", with_home=True)


def test_a_mask_that_came_or_went_is_found(packed: Path, check: Check) -> None:
    path = snippets_of(home_of(packed) / "train")[0]
    rewrite(path, keypoints=None)
    assert_finds(check, "its npz cannot be read: no array 'keypoints'", with_home=True)
