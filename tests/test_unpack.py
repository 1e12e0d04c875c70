"""unpack: npz back from shards, bit-exact from zstd, and nothing from shards that are not whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from clips.codecs import make_codec
from clips.errors import InputError
from clips.manifest import tar_path
from convert.pack import PackConfig, pack
from convert.unpack import UnpackConfig, unpack
from convert.verify import VerifyConfig, verify
from tests.forging import first, forge, with_field
from tests.making import HOME, tell_tale_mask, tell_tale_video, write_home
from tests.packing import convert, members_of, rewrite, snippets_of, stamps, tree, use_threads

COUNTS = {"train": {"nongesture": 3, "gesture": 2}, "val": {"gesture": 1}}


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    use_threads(monkeypatch)
    return PackConfig(write_home(tmp_path, COUNTS, padded_every=3), tmp_path / "out", codec="zstd", shard_mib=0.06, workers=2)


@pytest.fixture
def back(tmp_path: Path) -> Path:
    return tmp_path / "back" / HOME


def arrays_of(home: Path) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for path in snippets_of(home):
        with np.load(path, allow_pickle=False) as arrays:
            found[path.relative_to(home).as_posix()] = dict(arrays)
    return found


def assert_same_arrays(one: Path, other: Path) -> None:
    ours, theirs = arrays_of(one), arrays_of(other)
    assert ours.keys() == theirs.keys()
    for path, arrays in ours.items():
        assert arrays.keys() == theirs[path].keys()
        for name, array in arrays.items():
            found = theirs[path][name]
            assert (array.dtype, array.shape) == (found.dtype, found.shape), (path, name)
            assert np.array_equal(array, found) and np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(found).tobytes()


def test_npz_come_back_bit_exact_and_pack_to_the_same_shards(packing: PackConfig, back: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(packing)
    assert unpack(UnpackConfig(packing.output, back, workers=2)) == 0
    assert capsys.readouterr().out == "6 npz written: every packed array has the sha256 that it had before\n"
    assert_same_arrays(packing.dataset_home, back)
    assert not list(back.rglob(".*"))
    assert verify(VerifyConfig(packing.output, back, workers=1)) == 0
    assert capsys.readouterr().out.endswith("bit-exact: npz can be rebuilt\n")
    (packing.output / "verified.json").unlink()
    assert [p.stat().st_size for p in snippets_of(back)] == [p.stat().st_size for p in snippets_of(packing.dataset_home)]
    pack(replace(packing, dataset_home=back, output=tmp_path / "again"))
    assert tree(tmp_path / "again") == tree(packing.output)


MASK = tell_tale_mask(0, 8, 32, 32)


@pytest.mark.parametrize("dtype", ["bool", "i1", "<i4", ">i2", "u8"])
def test_masks_of_every_dtype_and_order_come_back(dtype: str, packing: PackConfig, back: Path) -> None:
    paths = snippets_of(packing.dataset_home)
    rewrite(paths[0], keypoints=MASK.astype(dtype))
    rewrite(paths[1], keypoints=np.asfortranarray(MASK.astype(dtype)), video=np.asfortranarray(tell_tale_video(1, 8, 32, 32)))
    pack(packing)
    unpack(UnpackConfig(packing.output, back, workers=1))
    assert_same_arrays(packing.dataset_home, back)
    assert verify(VerifyConfig(packing.output, packing.dataset_home, workers=1)) == 0


def test_kept_arrays_of_every_kind_and_missing_masks_come_back(packing: PackConfig, back: Path) -> None:
    paths = snippets_of(packing.dataset_home)
    extras: dict[str, Any] = {
        "fps": np.array(29.97),
        "video_OF": np.asfortranarray(np.random.RandomState(0).randint(0, 256, (8, 32, 32, 6), dtype=np.uint8)),
        "words": np.array(["ab", "émis"]),
        "big_endian": np.arange(5, dtype=">f8"),
        "none": np.zeros((0, 3), np.int16),
        "truth": np.array([True, False]),
    }
    rewrite(paths[0], **extras)
    rewrite(paths[1], fps=np.array(25, np.int32))
    rewrite(paths[2], keypoints=None)
    pack(replace(packing, extras="keep", keypoints="optional"))
    unpack(UnpackConfig(packing.output, back, workers=1))
    assert_same_arrays(packing.dataset_home, back)
    assert verify(VerifyConfig(packing.output, packing.dataset_home, workers=1)) == 0


def test_names_with_dots_spaces_and_other_letters_come_back(packing: PackConfig, back: Path) -> None:
    for number, path in enumerate(snippets_of(packing.dataset_home)[:3]):
        path.rename(path.with_name(["1_a.b c.npz", "2_émission ☺.npz", "000000003_x..npz"][number]))
    pack(packing)
    unpack(UnpackConfig(packing.output, back, workers=1))
    assert_same_arrays(packing.dataset_home, back)


def test_from_jpeg_the_frames_are_the_decoded_ones(packing: PackConfig, back: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(replace(packing, codec="jpeg", store_size=16))
    unpack(UnpackConfig(packing.output, back, workers=1))
    assert "frames are as decoded from JPEG, not as they were; other packed arrays are exact" in capsys.readouterr().out
    members, jpeg = members_of(packing.output), make_codec("jpeg")
    originals = arrays_of(packing.dataset_home)
    for path, arrays in arrays_of(back).items():
        frames = msgpack.unpackb(members[f"{path.removesuffix('.npz')}.frames.mp"])["frames"]
        expected = np.empty((8, 16, 16, 3), np.uint8)
        for frame, out in zip(frames, expected, strict=True):
            jpeg.decode(frame, out)
        assert np.array_equal(arrays["video"], expected) and np.array_equal(arrays["keypoints"], originals[path]["keypoints"])


def test_a_second_run_writes_only_what_is_missing(packing: PackConfig, back: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(packing)
    config = UnpackConfig(packing.output, back, workers=1)
    unpack(config)
    before = stamps(back)
    unpack(config)
    assert stamps(back) == before
    gone = snippets_of(back)[2]
    gone.unlink()
    capsys.readouterr()
    unpack(config)
    told = capsys.readouterr().out
    assert told.startswith("1 npz written: ") and "5 were there and were not looked at" in told
    changed = {name for name, stamp in stamps(back).items() if before[name] != stamp}
    assert changed == {gone.relative_to(back).as_posix()}


def test_only_the_asked_splits_come_back(packing: PackConfig, back: Path) -> None:
    pack(packing)
    unpack(UnpackConfig(packing.output, back, ("val",), workers=1))
    assert [path.parts[-3] for path in snippets_of(back)] == ["val"]
    with pytest.raises(InputError, match=r"--splits test: the shards hold train, val\."):
        unpack(UnpackConfig(packing.output, back, ("test",)))


def unpack_says(packing: PackConfig, back: Path) -> str:
    with pytest.raises(InputError) as error:
        unpack(UnpackConfig(packing.output, back, workers=1))
    assert "\n" not in str(error.value) and not list(back.rglob(".*"))
    return str(error.value)


def test_a_damaged_shard_is_a_clear_error(packing: PackConfig, back: Path) -> None:
    pack(packing)
    path = tar_path(packing.output, "val", "val-000000")
    whole = path.read_bytes()
    path.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    text = unpack_says(packing, back)
    assert text.startswith(f"{path}: clip 'val/gesture/000000000_val_gesture_000', member ") and "damaged. Run python -m convert verify." in text
    path.write_bytes(whole[:3000])
    assert "damaged" in unpack_says(packing, back)
    path.unlink()
    assert f"{path}: No such file" in unpack_says(packing, back)
    path.write_bytes(whole)
    (packing.output / "val/val-000000.index.mp").write_bytes(b"\x80")
    assert "val-000000.index.mp: sha256 is not the manifest's" in unpack_says(packing, back)


@pytest.mark.parametrize(
    ("suffix", "name", "value", "text"),
    [
        ("json", "path", "../../../outside.npz", "tells of the npz '../../../outside.npz'"),
        ("json", "path", "/outside.npz", "tells of the npz '/outside.npz'"),
        ("json", "path", 3, "Run python -m convert verify"),
        ("json", "arrays", {}, "its json tells of the arrays , its members are video, keypoints"),
        ("json", "arrays", 3, "Run python -m convert verify"),
        ("keypoints.mp", "shape", [1, 1, 1], "Run python -m convert verify"),
        ("frames.mp", "frames", [], "has another sha256 than before packing"),
    ],
)
def test_forged_members_give_no_npz_elsewhere_and_no_traceback(
    suffix: str, name: str, value: Any, text: str, packing: PackConfig, back: Path, tmp_path: Path
) -> None:
    pack(packing)
    forge(packing.output, with_field(suffix, name, value))
    assert text in unpack_says(packing, back)
    assert not list(tmp_path.rglob("outside*"))


def test_a_forged_key_leads_nowhere_else(packing: PackConfig, back: Path, tmp_path: Path) -> None:
    pack(packing)

    def change(clip: Any) -> None:
        told = json.loads(clip.members["json"])
        told["path"] = "../../outside.npz"
        clip.members["json"] = json.dumps(told).encode()
        clip.facts = replace(clip.facts, key="__/__/outside")

    forge(packing.output, first(change))
    assert "tells of the npz '../../outside.npz'" in unpack_says(packing, back)
    assert not list(tmp_path.rglob("outside*"))


def test_an_output_that_cannot_be_written_is_one_clear_line(packing: PackConfig, tmp_path: Path) -> None:
    pack(packing)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Not a directory"):
        unpack(UnpackConfig(packing.output, tmp_path / "file", workers=1))


def test_the_command_unpacks(packing: PackConfig, back: Path) -> None:
    pack(packing)
    done = convert("unpack", packing.output, back, "--workers", "1")
    assert done.returncode == 0 and done.stdout.startswith("6 npz written"), done.stderr
    sums = [{hashlib.sha256(a.tobytes()).hexdigest() for arrays in arrays_of(home).values() for a in arrays.values()} for home in (packing.dataset_home, back)]
    assert sums[0] == sums[1]
    missing = convert("unpack", packing.dataset_home, back)
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and "These are npz snippets" in missing.stderr
