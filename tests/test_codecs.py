"""The contract of every codec: frames come back, other bytes are a ValueError; and what each codec writes."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import zstandard
from PIL import Image

from clips.clip import ClipSpec
from clips.codecs import CODECS, Codec, make_codec
from clips.errors import InputError
from tests.making import tell_tale_video


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    return make_codec(request.param)


def test_a_codec_is_rebuilt_from_its_settings(codec: Codec) -> None:
    assert codec.name in CODECS
    again = make_codec(codec.name, codec.settings())
    frame = tell_tale_video(3, 1, 24, 40)[0]
    assert again.settings() == codec.settings() and again.encode(frame) == codec.encode(frame)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (33, 64)])
def test_a_frame_comes_back(codec: Codec, size: tuple[int, int]) -> None:
    y, x = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    frame = np.stack([100 + 2 * y, 90 + x, 128 + y - x], axis=-1).astype(np.uint8)  # smooth, as pictures are
    out = np.full_like(frame, 77)
    for blob in (codec.encode(frame), memoryview(bytearray(codec.encode(frame)))):
        codec.decode(blob, out)
        assert np.array_equal(out, frame) if codec.lossless else abs(out.astype(int) - frame).max() <= 12


@pytest.mark.parametrize("name", [name for name in sorted(CODECS) if make_codec(name).lossless])
def test_a_lossless_codec_keeps_noise(name: str) -> None:
    codec = make_codec(name)
    frame = np.random.RandomState(0).randint(0, 256, (31, 17, 3), dtype=np.uint8)
    out = np.empty_like(frame)
    codec.decode(codec.encode(frame), out)
    assert np.array_equal(out, frame)


def test_bytes_that_are_no_such_frame_are_a_value_error(codec: Codec) -> None:
    frame = np.random.RandomState(0).randint(0, 256, (24, 24, 3), dtype=np.uint8)
    blob = codec.encode(frame)
    larger = codec.encode(np.zeros((32, 32, 3), np.uint8))
    smaller = codec.encode(np.zeros((8, 8, 3), np.uint8))
    guarded = np.full((26, 24, 3), 7, np.uint8)
    for bad in (b"", b"\0", b"no frame at all", blob[: len(blob) // 2], blob[:10], larger, smaller):
        with pytest.raises(ValueError):
            codec.decode(bad, guarded[1:25])
    assert (guarded[0] == 7).all() and (guarded[-1] == 7).all()  # nothing was written beside `out`


def test_a_zstd_frame_that_claims_to_be_huge_is_a_value_error() -> None:
    """A frame header of one segment with an eight-byte content size of 2^60: nobody may try to allocate that."""
    huge = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(ValueError):
        make_codec("zstd").decode(huge, np.zeros((4, 4, 3), np.uint8))


def test_eight_threads_share_a_codec(codec: Codec) -> None:
    frames = [tell_tale_video(number, 1, 48, 48)[0] for number in range(64)]
    alone = [codec.encode(frame) for frame in frames]

    def round_trip(frame: np.ndarray) -> tuple[bytes, np.ndarray]:
        blob, out = codec.encode(frame), np.empty_like(frame)
        codec.decode(blob, out)
        return blob, out

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(round_trip, frames))
    assert [blob for blob, _ in together] == alone
    for number, (blob, out) in enumerate(together):
        again = np.empty_like(frames[number])
        codec.decode(blob, again)
        assert np.array_equal(out, again)


def test_the_estimate_is_arithmetic_on_the_geometry(codec: Codec) -> None:
    one, two = codec.estimated_bytes(ClipSpec(10, 100, 100)), codec.estimated_bytes(ClipSpec(20, 100, 100))
    assert isinstance(one, int) and one > 0 and abs(two - 2 * one) <= 1


def test_the_estimates_of_the_usual_clip_are_the_measured_ones() -> None:
    spec = ClipSpec(39, 320, 320)
    assert 0.70e6 < make_codec("jpeg").estimated_bytes(spec) < 0.80e6
    assert 6.9e6 < make_codec("zstd").estimated_bytes(spec) < 7.3e6
    by_quality = [make_codec("jpeg", {"quality": quality}).estimated_bytes(spec) for quality in range(1, 101)]
    assert by_quality == sorted(by_quality)


def test_jpeg_is_baseline_with_halved_colour() -> None:
    """SOF0 is baseline (SOF2 would be progressive); sampling factors 2x2, 1x1, 1x1 are 4:2:0. Read by Pillow."""
    blob = make_codec("jpeg").encode(tell_tale_video(0, 1, 32, 48)[0])
    picture: Any = Image.open(io.BytesIO(blob))  # Any: `layer` and `info` are of Pillow's JPEG plugin alone
    assert (picture.mode, picture.size) == ("RGB", (48, 32))
    assert not picture.info.get("progressive")
    assert [component[1:3] for component in picture.layer] == [(2, 2), (1, 1), (1, 1)]


def test_jpeg_pixels_are_pillows() -> None:
    jpeg = make_codec("jpeg")
    frame = np.clip(tell_tale_video(5, 1, 40, 56)[0], 20, 235)
    out = np.empty_like(frame)
    blob = jpeg.encode(frame)
    jpeg.decode(blob, out)
    assert abs(out.astype(int) - np.asarray(Image.open(io.BytesIO(blob)))).max() <= 1


def test_a_zstd_frame_is_plain_zstandard_of_the_rows() -> None:
    frame = tell_tale_video(1, 1, 12, 20)[0]
    assert zstandard.ZstdDecompressor().decompress(make_codec("zstd").encode(frame[:, ::2])) == frame[:, ::2].tobytes()


@pytest.mark.parametrize(("name", "values"), [("jpeg", {"quality": 0}), ("jpeg", {"quality": 101}), ("zstd", {"level": 0}), ("zstd", {"level": 23})])
def test_a_setting_out_of_range_names_its_flag(name: str, values: dict[str, int | str]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(values))} "):
        make_codec(name, values)
