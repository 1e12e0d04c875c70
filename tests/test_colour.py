"""Colours and erased boxes: against PIL and numpy, the same bytes from any device's code, and by the clip's own chance through a loader."""

from __future__ import annotations

import colorsys
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from clips.clip import ClipSpec
from clips.command import parse
from clips.errors import InputError
from loaders.batch import Batch
from loaders.colour import (
    ERASED_SHARE,
    LOOK_DRAWS,
    OPS,
    Colour,
    Erasure,
    brightness,
    contrast,
    exact,
    hue,
    matrices,
    random_colour,
    random_erasure,
    saturation,
    then,
)
from loaders.device import crop_resize_flip, paint
from loaders.plan import Plan
from loaders.sample import AugmentConfig, Box, View, move_points, painted, whole_view
from loaders.source import open_source
from loaders.stream import DecodeIn, Loader
from tests import by_hand
from tests.loading import MANY_SHARDS_MIB, SEED, find_entry, flip_byte, keys_of, npz_home, shards

often = settings(max_examples=60, deadline=None)
UNCHANGED = exact(np.eye(3, 4))
ALL = AugmentConfig(colour=0.4, strength=7, erasing=0.5)
factors = st.floats(0, 2)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, shape, np.uint8))


def view_with(colour: Colour | None = None, erasure: Erasure | None = None) -> View:
    return View(Box(0, 0, 24, 32), False, colour, erasure)


def coloured(video: torch.Tensor, colour: Colour) -> np.ndarray:
    """One clip (T, H, W, 3), on its own copy."""
    changed = video.clone()[None]
    paint(changed, [view_with(colour)])
    return changed[0].numpy()


def numpys(video: torch.Tensor, colour: Colour) -> np.ndarray:
    """The same worked out in float64: the matrix, turning over, clearing bits."""
    matrix = np.array(colour.matrix, np.float64)
    values = np.clip(np.rint(video.numpy().astype(np.float64) @ matrix[:, :3].T + matrix[:, 3]), 0, 255).astype(int)
    values = np.where(values > colour.above, 255 - values, values)
    return values // (256 - colour.bits) * (256 - colour.bits)


def drawn(epoch: int, jitter: float = 0.4, strength: float = 7.0) -> Colour:
    found = random_colour(np.array(by_hand.uniforms(LOOK_DRAWS, "look", SEED, epoch, "k", 0)), jitter, strength)
    assert found is not None
    return found


@often
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 10, exclude_min=True))
def test_every_drawn_colour_gives_the_very_bytes_that_float64_gives(epoch: int, jitter: float, strength: float) -> None:
    """Exact, so any device and any order of the sums gives the same."""
    video = noise(2, 9, 11, 3, seed=epoch % 2**32)
    colour = drawn(epoch, jitter, strength)
    np.testing.assert_array_equal(coloured(video, colour), numpys(video, colour))
    in_fp32 = torch.from_numpy(np.array(colour.matrix, np.float32))
    fused = torch.nn.functional.linear(video.float(), in_fp32[:, :3].contiguous(), in_fp32[:, 3].contiguous()).round().clamp(0, 255).to(torch.uint8)
    np.testing.assert_array_equal(coloured(video, replace(colour, above=255, bits=0xFF)), fused.numpy())


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
def test_brightness_contrast_and_saturation_are_pils(factor: float) -> None:
    video = noise(1, 24, 32, 3)
    image = Image.fromarray(video[0].numpy())
    grey = Image.new("RGB", image.size, (128, 128, 128))  # PIL's contrast takes the image's mean
    expected = {
        "brightness": (brightness(factor), ImageEnhance.Brightness(image).enhance(factor)),
        "contrast": (contrast(factor), Image.blend(grey, image, factor)),
        "saturation": (saturation(factor), ImageEnhance.Color(image).enhance(factor)),
    }
    for matrix, theirs in expected.values():
        ours = coloured(video, Colour(exact(matrix)))
        assert np.abs(ours[0].astype(int) - np.asarray(theirs).astype(int)).max() <= 2  # PIL cuts where we round, and rounds its grey first


@pytest.mark.parametrize(("above", "bits"), [(127, 0xFF), (0, 0xFF), (254, 0xFF), (255, 0xF0), (255, 0xFE), (76, 0xE0)])
def test_solarize_and_posterize_are_pils(above: int, bits: int) -> None:
    video = noise(1, 24, 32, 3)
    image = ImageOps.solarize(Image.fromarray(video[0].numpy()), above + 1)
    expected = ImageOps.posterize(image, bin(bits).count("1"))
    np.testing.assert_array_equal(coloured(video, Colour(UNCHANGED, above, bits))[0], np.asarray(expected))


@often
@given(st.floats(-0.5, 0.5), factors)
def test_hue_and_saturation_leave_grey_and_brightness_as_they_are(turns: float, factor: float) -> None:
    greys = torch.arange(256, dtype=torch.uint8)[None, :, None, None].expand(1, 256, 1, 3).contiguous()
    for matrix in (hue(turns), saturation(factor)):
        np.testing.assert_array_equal(coloured(greys, Colour(exact(matrix))), greys.numpy())
        np.testing.assert_allclose(np.array([0.299, 0.587, 0.114]) @ matrix[:, :3], [0.299, 0.587, 0.114], atol=2e-3)


def test_a_whole_turn_changes_nothing_and_hue_turns_the_way_that_hsv_does() -> None:
    np.testing.assert_allclose(hue(1.0), np.eye(3, 4), atol=1e-9)
    np.testing.assert_allclose(hue(0.2)[:, :3] @ hue(-0.2)[:, :3], np.eye(3), atol=1e-9)
    for turns in (1 / 12, 1 / 6, 1 / 3, -1 / 12):
        red, green, blue = (np.clip(hue(turns)[:, :3] @ [200, 100, 100], 0, 255) / 255).tolist()
        found = (colorsys.rgb_to_hsv(red, green, blue)[0] + 0.5) % 1 - 0.5
        assert found == pytest.approx(turns, abs=0.07)


def test_two_changes_in_one_are_one_after_the_other() -> None:
    pixel = np.array([10.0, 200.0, 60.0])
    for first, second in ((contrast(0.5), brightness(2)), (brightness(2), contrast(0.5)), (hue(0.1), saturation(1.5))):
        between = first[:, :3] @ pixel + first[:, 3]
        both = then(first, second)
        np.testing.assert_allclose(both[:, :3] @ pixel + both[:, 3], second[:, :3] @ between + second[:, 3])


@often
@given(st.integers(0, 10**6))
def test_coefficients_are_multiples_that_fp32_adds_without_rounding(epoch: int) -> None:
    matrix = np.array(drawn(epoch, 1.0, 10.0).matrix)
    assert np.array_equal(matrix * 256, np.rint(matrix * 256))
    assert (np.abs(matrix[:, :3]) * 255).sum(axis=1).max() + np.abs(matrix[:, 3]).max() < 2**24 / 256
    assert np.ptp(matrix[:, :3].sum(axis=1)) == 0 and np.ptp(matrix[:, 3]) == 0  # grey stays grey


def test_no_jitter_and_no_strength_draw_no_colour_and_the_view_stays_itself() -> None:
    view = whole_view(24, 32)
    assert painted(view, AugmentConfig(), 0, 0, "k") is view
    assert random_colour(np.zeros(LOOK_DRAWS), 0.0, 0.0) is None and random_erasure(np.zeros(LOOK_DRAWS), 0.0) is None


def test_jitter_alone_is_the_product_of_its_four_changes() -> None:
    draws = np.full(LOOK_DRAWS, 0.5)
    draws[:4] = [1.0, 0.0, 0.75, 0.25]
    found = random_colour(draws, 0.4, 0.0)
    steps = [brightness(1.4), contrast(0.6), saturation(1.2), hue(-0.05)]
    point = np.array([200.0, 100.0, 50.0])
    for step in steps:
        point = step[:, :3] @ point + step[:, 3]
    assert found is not None and (found.above, found.bits) == (255, 0xFF)
    matrix = np.array(found.matrix)
    np.testing.assert_allclose(matrix[:, :3] @ [200, 100, 50] + matrix[:, 3], point, atol=3 * 200 / 512)


@pytest.mark.parametrize(("strength", "above", "bits"), [(10, 0, 0xF0), (7, 76, 0xF8), (5, 127, 0xFC)])
def test_strength_sets_how_much_is_turned_over_and_cleared(strength: float, above: int, bits: int) -> None:
    draws = np.zeros(LOOK_DRAWS)
    draws[4], draws[6] = ((OPS.index(name) + 0.5) / len(OPS) for name in ("solarize", "posterize"))
    assert random_colour(draws, 0.0, strength) == Colour(UNCHANGED, above, bits)


@pytest.mark.parametrize(
    ("op", "sign", "matrix"), [("brightness", 0.9, brightness(0.1)), ("contrast", 0.1, contrast(1.9)), ("saturation", 0.9, saturation(0.1))]
)
def test_strength_ten_makes_the_factors_nearly_double_or_nothing(op: str, sign: float, matrix: np.ndarray) -> None:
    draws = np.zeros(LOOK_DRAWS)
    draws[4:8] = [(OPS.index(op) + 0.5) / len(OPS), sign, (OPS.index("posterize") + 0.5) / len(OPS), 0]
    assert random_colour(draws, 0.0, 10.0) == Colour(exact(matrix), 255, 0xF0)


def test_every_op_is_drawn_equally_often() -> None:
    places = np.array([by_hand.uniforms(LOOK_DRAWS, "look", 0, epoch, "k", 0) for epoch in range(600)])[:, [4, 6]]
    counts = np.bincount((places * len(OPS)).astype(int).reshape(-1), minlength=len(OPS))
    assert np.abs(counts - 200).max() < 4.5 * np.sqrt(200)


def drawn_erasures(chance: float, number: int = 1500) -> list[Erasure]:
    found = [random_erasure(np.array(by_hand.uniforms(LOOK_DRAWS, "look", 0, epoch, "k", 0)), chance) for epoch in range(number)]
    return [erasure for erasure in found if erasure]


def test_as_many_boxes_as_asked_of_the_published_sizes_everywhere_in_any_colour() -> None:
    assert abs(len(drawn_erasures(0.25)) - 375) < 4.5 * np.sqrt(375 * 0.75)
    erasures = drawn_erasures(1.0)
    shares = np.array([erasure.height * erasure.width for erasure in erasures])
    ratios = np.array([erasure.height / erasure.width for erasure in erasures])
    assert ERASED_SHARE[0] <= shares.min() < 0.03 and 0.32 < shares.max() <= ERASED_SHARE[1] + 1e-12
    assert 0.3 - 1e-12 <= ratios.min() < 0.32 and 3.1 < ratios.max() < 1 / 0.3 + 1e-12
    fills = np.array([erasure.fill for erasure in erasures])
    assert fills.min() == 0 and fills.max() == 255 and np.abs(fills.mean(axis=0) - 127.5).max() < 4.5 * 74 / np.sqrt(len(fills))
    stretches = [erasure.of(20, 30) for erasure in erasures]
    assert all(0 <= part.start < part.stop <= size for down, across in stretches for part, size in ((down, 20), (across, 30)))
    assert {down.start for down, _ in stretches} >= set(range(15)) and max(down.stop for down, _ in stretches) == 20
    assert max(across.stop for _, across in stretches) == 30


def test_an_erased_box_has_one_colour_in_all_frames_and_nothing_else_changes() -> None:
    video = noise(2, 3, 20, 30, 3)
    before = video.clone()
    paint(video, [view_with(), view_with(erasure=Erasure(0.5, 0.999, 0.25, 0.1, (1, 2, 255)))])
    expected = before.numpy().copy()
    expected[1, :, 8:13, 27:30] = (1, 2, 255)  # 5 of 20 rows, in the middle of the 16 places; the last 3 columns
    np.testing.assert_array_equal(video.numpy(), expected)


@often
@given(st.integers(0, 10**6), st.booleans())
def test_joints_are_erased_with_their_pixels(epoch: int, flip: bool) -> None:
    (erasure,) = drawn_erasures(1.0, 1) if not epoch else [random_erasure(np.array(by_hand.uniforms(LOOK_DRAWS, "look", 1, epoch, "k", 0)), 1.0)]
    assert erasure is not None
    mask = np.random.RandomState(epoch % 2**32).rand(2, 24, 32) < 0.3
    view = View(Box(0, 0, 24, 32), flip, None, replace(erasure, fill=(0, 0, 0)))
    pixels = crop_resize_flip(torch.from_numpy(np.repeat(mask[None, ..., None] * np.uint8(255), 3, axis=-1)), [view], (24, 32))
    moved = move_points(np.argwhere(mask), view, (24, 32), (24, 32), (24, 32))
    found = np.zeros_like(mask)
    found[tuple(moved.T)] = True
    np.testing.assert_array_equal(found, pixels[0, ..., 0].numpy() == 255)


def test_each_clip_of_a_batch_is_painted_as_it_is_alone() -> None:
    video = noise(4, 2, 24, 32, 3)
    views = [view_with(), *(painted(view_with(), ALL, 0, epoch, "k") for epoch in range(3))]
    alone = [crop_resize_flip(video[place : place + 1], [view], (12, 16)) for place, view in enumerate(views)]
    assert torch.equal(crop_resize_flip(video, views, (12, 16)), torch.cat(alone))
    assert not torch.equal(alone[1], crop_resize_flip(video[1:2], [view_with()], (12, 16)))


def test_a_clip_without_colour_beside_one_that_has_some_is_untouched() -> None:
    video = noise(2, 2, 8, 8, 3)
    before = video.clone()
    paint(video, [view_with(), view_with(replace(drawn(0), above=9, bits=0xF0))])
    assert torch.equal(video[0], before[0]) and not torch.equal(video[1], before[1])
    np.testing.assert_array_equal(matrices([None])[0], np.eye(3, 4))


@contextmanager
def loader(base: Path, augment: AugmentConfig, repeats: int = 1, decode_in: DecodeIn = "threads") -> Iterator[Loader]:
    source = open_source(shards(base, "zstd", MANY_SHARDS_MIB), "train")
    made = Plan(len(source.facts), 4, 2, SEED, repeats=repeats)
    spec = ClipSpec(3, 24, 32)
    with closing(Loader(source, made, spec, torch.device("cpu"), 1, 1, None, augment, with_points=True, decode_in=decode_in)) as found:
        yield found


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def videos(batches: Iterator[Batch]) -> dict[tuple[int, str], torch.Tensor]:
    """By place in the epoch and key."""
    return {(place, key): clip.clone() for batch in batches for place, key, clip in zip(batch.position, batch.key, batch.video, strict=True)}


def test_a_loader_paints_by_each_clips_own_chance_in_threads_and_beside(base: Path) -> None:
    plain = AugmentConfig(crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3))
    config = replace(ALL, crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3))
    with loader(base, plain) as unpainted, loader(base, config) as threads, loader(base, config, decode_in="process") as beside:
        for epoch in (0, 1):
            before, found, others = videos(unpainted.training(epoch)), videos(threads.training(epoch)), videos(beside.training(epoch))
            assert before.keys() == found.keys() == others.keys() and len(before) == 20
            for place, key in before:
                expected = before[place, key].clone()[None]
                paint(expected, [painted(view_with(), config, SEED, epoch, key)])
                assert torch.equal(found[place, key], expected[0]) and torch.equal(others[place, key], expected[0])


def test_the_second_epoch_is_painted_anew_and_a_resume_as_before(base: Path) -> None:
    with loader(base, ALL) as one, loader(base, ALL) as resumed:
        first, second = videos(one.training(0)), videos(one.training(1))
        tail = videos(resumed.training(1, consumed=8))
    by_key = {key: clip for (_, key), clip in first.items()}
    assert not any(torch.equal(clip, by_key[key]) for (_, key), clip in second.items() if key in by_key)
    assert len(tail) == 12 and all(torch.equal(clip, second[place]) for place, clip in tail.items())


def test_evaluation_is_never_painted(base: Path) -> None:
    with loader(base, ALL) as one, loader(base, AugmentConfig()) as other:
        found, expected = videos(one.evaluation()), videos(other.evaluation())
    assert all(torch.equal(found[place], expected[place]) for place in expected)


def test_repeats_show_a_clip_with_other_chance_each_time(base: Path) -> None:
    with loader(base, AugmentConfig()) as once, loader(base, AugmentConfig(), repeats=2) as twice:
        single, double = videos(once.training(0)), videos(twice.training(0))
    assert len(double) == 40
    keys = [key for _, key in sorted(double)]
    assert keys[::2] == keys[1::2] == [key for _, key in sorted(single)]
    for place in range(0, 40, 2):
        key = keys[place]
        assert torch.equal(double[place, key], single[place // 2, key])  # the first time as without repeats
        assert not torch.equal(double[place, key], double[place + 1, key])


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Shards with one clip that cannot be read, and its key."""
    home = tmp_path_factory.mktemp("torn") / "shards"
    shutil.copytree(shards(tmp_path_factory.getbasetemp(), "zstd", MANY_SHARDS_MIB), home)
    key = keys_of(npz_home(tmp_path_factory.getbasetemp()))[3]
    tar, entry = find_entry(home, key)
    for offset in entry.frames["offset"].tolist():
        flip_byte(tar, offset + 20)
    return home, key


@pytest.mark.parametrize("decode_in", ["threads", "process"])
def test_a_clip_that_cannot_be_read_stays_zeros(torn: tuple[Path, str], decode_in: DecodeIn) -> None:
    home, key = torn
    with closing(open_source(home, "train")) as source:
        reading = (replace(ALL, erasing=1), True, 0, decode_in, None, 1)
        with closing(Loader(source, Plan(21, 21, 21, SEED), ClipSpec(3, 24, 32), torch.device("cpu"), 1, 1, None, *reading)) as made:
            (batch,) = made.training(0)
    place = batch.key.index(key)
    assert batch.weight.sum() == 20 and batch.weight[place] == 0
    assert batch.video[place].max() == 0 and batch.video[place - 1].max() > 0


@pytest.mark.parametrize(("flag", "values"), [("--colour", (-0.1, 1.1)), ("--strength", (-1, 11)), ("--erasing", (-0.1, 1.5))])
def test_paint_out_of_range_is_an_error_that_names_the_flag(flag: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(InputError, match=flag):
            parse(AugmentConfig, "train.py", "", [flag, str(value)])


@pytest.mark.gpu
def test_a_gpu_paints_to_the_bytes_of_the_cpu() -> None:
    video = noise(16, 4, 64, 64, 3)
    views = [painted(view_with(), ALL, 0, epoch, "k") for epoch in range(16)]
    there = video.cuda()
    paint(there, views)
    paint(video, views)
    assert torch.equal(there.cpu(), video)
