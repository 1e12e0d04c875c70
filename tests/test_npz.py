"""The npz reader against numpy: the same arrays, never a wrong one, nothing unpickled."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clips.npz import BadNpz, read_arrays, read_headers
from tests.making import tell_tale_mask, tell_tale_video

ARRAYS = {
    "video": tell_tale_video(1, 3, 8, 8),
    "keypoints": tell_tale_mask(1, 3, 8, 8),
    "bools": np.array([[True, False, True]]),
    "fortran": np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
    "big_endian": np.arange(5, dtype=">i4"),
    "floats": np.linspace(0, 1, 7),
    "halves": np.arange(3, dtype=np.float16),
    "complex": np.array([1 + 2j]),
    "texts": np.array(["ab", "é"]),
    "raw": np.array([b"x\0y", b""]),
    "dates": np.array(["2020-01-01"], "M8[D]"),
    "fields": np.array([(1, 2.5)], [("a", "i4"), ("b", "f8")]),
    "zero_d": np.array(29.97),
    "empty": np.zeros((0, 3)),
    "empty_fortran": np.asfortranarray(np.zeros((2, 0, 3), np.uint8)),
    "strided": np.arange(20)[::3],
}


@pytest.fixture(params=["stored", "compressed"])
def npz(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "arrays.npz"
    save: Any = np.savez if request.param == "stored" else np.savez_compressed  # Any: numpy's stubs take the arrays for flags
    save(path, **ARRAYS)
    return path


def test_every_array_is_what_numpy_reads(npz: Path) -> None:
    found, headers = read_arrays(npz), read_headers(npz)
    with np.load(npz, allow_pickle=False) as expected:
        assert list(found) == list(headers) == expected.files
        for name, array in found.items():
            assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), name
            assert (headers[name].dtype, headers[name].shape) == (array.dtype, array.shape), name
            assert array.tobytes() == expected[name].tobytes() and array.flags.c_contiguous, name
    assert headers["fortran"].fortran_order and not headers["video"].fortran_order


def test_only_the_named_arrays_are_read(npz: Path) -> None:
    assert set(read_arrays(npz, {"video", "nothing"})) == {"video"}


def test_an_array_larger_than_the_peek_is_read(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (300, 1000), dtype=np.uint8)
    np.savez_compressed(tmp_path / "large.npz", noise=noise)
    assert np.array_equal(read_arrays(tmp_path / "large.npz")["noise"], noise)
    assert read_headers(tmp_path / "large.npz")["noise"].shape == (300, 1000)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_byte_never_gives_a_wrong_array(save: Any, tmp_path: Path) -> None:
    """About 200 places over the whole file, its local headers and directory too, four values each."""
    path = tmp_path / "snippet.npz"
    save(path, video=tell_tale_video(1, 2, 8, 8), keypoints=tell_tale_mask(1, 2, 8, 8))
    whole, expected = path.read_bytes(), read_arrays(path)
    num_bad = 0
    for place in range(0, len(whole), max(1, len(whole) // 200)):
        for value in {whole[place] ^ 0xFF, whole[place] ^ 1, ord("("), 0} - {whole[place]}:
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with warnings.catch_warnings():  # Python's parser warns of a damaged header before it refuses it
                warnings.simplefilter("ignore")
                with contextlib.suppress(BadNpz):
                    read_headers(path)
                try:
                    found = read_arrays(path)
                except BadNpz:
                    num_bad += 1
                    continue
            for name in found.keys() & expected.keys():
                assert found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name]), (place, value, name)
    assert num_bad > 200


def test_a_file_cut_anywhere_is_a_bad_npz(npz: Path) -> None:
    whole = npz.read_bytes()
    for length in sorted({0, 1, 3, *range(4, len(whole), len(whole) // 40), len(whole) - 1}):
        npz.write_bytes(whole[:length])
        for read in (read_headers, read_arrays):
            with pytest.raises(BadNpz):
                read(npz)


@dataclass
class Trap:
    """Makes a folder when it is unpickled."""

    folder: str

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = np.array([Trap(str(sprung))], dtype=object)
    fields = np.zeros(1, [("a", "i4"), ("b", object)])
    fields["b"][0] = Trap(str(sprung))
    np.savez(tmp_path / "trap.npz", trap=trap)
    np.savez(tmp_path / "fields.npz", fields=fields)
    for name in ("trap", "fields"):
        assert read_headers(tmp_path / f"{name}.npz")[name].dtype.hasobject
        with pytest.raises(BadNpz, match="pickled objects, which are never loaded"):
            read_arrays(tmp_path / f"{name}.npz")
    assert not sprung.exists()


def test_files_that_are_no_npz_say_so(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", np.arange(3))
    (tmp_path / "one.npz").write_bytes((tmp_path / "one.npy").read_bytes())
    (tmp_path / "folder.npz").mkdir()
    for name in ("text.npz", "one.npz", "folder.npz", "missing.npz"):
        with pytest.raises(BadNpz):
            read_arrays(tmp_path / name)


@pytest.mark.parametrize(("member", "reason"), [(b"no npy", "not an npy array"), (b'\x93NUMPY\x01\x00\x05\x00{"a"}', "not an npy array")])
def test_members_that_are_no_npy_are_bad(member: bytes, reason: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("video.npy", member)
    for read in (read_headers, read_arrays):
        with pytest.raises(BadNpz, match=reason):
            read(tmp_path / "odd.npz")


def test_a_header_that_promises_more_than_the_data_is_bad(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.arange(10, dtype=np.uint8))
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("video.npy", stream.getvalue()[:-3])
    with pytest.raises(BadNpz, match="7 bytes do not make"):
        read_arrays(tmp_path / "short.npz")


def test_another_compression_is_named(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.arange(10))
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("video.npy", stream.getvalue())
    with pytest.raises(BadNpz, match="neither stored nor deflated"):
        read_headers(tmp_path / "lzma.npz")
