"""The contract of every loader in LOADERS: the planned clips, the very frames, crops and flips, points on their pixels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from clips.clip import ClipSpec
from clips.manifest import read_manifest
from clips.mix import hash64
from loaders import LOADERS
from loaders.batch import Batch
from loaders.sample import AugmentConfig
from loaders.source import fraction, open_source
from tests import by_hand
from tests.loading import (
    CROP,
    MANY_SHARDS_MIB,
    ONE_SHARD_MIB,
    SEED,
    STORED,
    Found,
    assert_same,
    by_key,
    expected_clip,
    home_for,
    keys_in,
    keys_of,
    npz_home,
    opened,
    shards,
)

WHOLE = ClipSpec(5, STORED.height, STORED.width)
LARGEST_JPEG_ERROR, MEAN_JPEG_ERROR = 20, 2.0  # of 255; measured 9 and 1.3, where a shift by one pixel makes a mean of 2.7


@pytest.fixture(params=sorted(LOADERS))
def loader(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def home(loader: str, base: Path) -> Path:
    return home_for(base, loader)


@pytest.fixture
def npz(base: Path) -> Path:
    return npz_home(base)


def test_clips_are_numbered_by_sorted_key_with_the_folders_as_labels(loader: str, home: Path, npz: Path) -> None:
    source = open_source(home, "train", loader)
    assert [fact.key for fact in source.facts] == keys_of(npz)
    assert source.class_names == ("nongesture", "gesture")
    assert [source.class_names[fact.label] for fact in source.facts] == [key.split("/")[1] for key in keys_of(npz)]
    assert source.stored == source.source == STORED
    assert source.describe() and all(line for line in source.describe())
    source.close()


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_gives_the_planned_clips_in_order(loader: str, home: Path, npz: Path, epoch: int) -> None:
    keys = keys_of(npz)
    with opened(home, loader) as made:
        batches = list(made.training(epoch))
    assert keys_in(batches) == [keys[number] for number in by_hand.permutation(21, "order", SEED, epoch)][:20]
    assert [keys[number] for batch in batches for number in batch.number] == keys_in(batches)
    assert [position for batch in batches for position in batch.position] == list(range(20))
    assert all(batch.labels == batch.label.tolist() and not batch.bad for batch in batches)


def test_a_batch_is_contiguous_bytes_of_the_asked_shape(loader: str, home: Path) -> None:
    with opened(home, loader) as made:
        for batch in made.training(0):
            assert len(batch) == 2
            assert batch.video.shape == (2, *CROP.video_shape) and batch.video.dtype == torch.uint8 and batch.video.is_contiguous()
            assert batch.keypoints is not None and batch.keypoints.shape == (2, *CROP.mask_shape) and batch.keypoints.dtype == torch.uint8
            assert batch.label.shape == (2,) and batch.label.dtype == torch.int64
            assert batch.weight.tolist() == [1.0, 1.0] and batch.weight.dtype == torch.float32


@pytest.mark.parametrize("epoch", [0, 1])
def test_frames_crop_flip_and_points_are_exactly_those_drawn(loader: str, home: Path, npz: Path, epoch: int) -> None:
    with opened(home, loader) as made:
        found = by_key(made.training(epoch))
    for key, (video, mask, label) in found.items():
        frames, drawn = expected_clip(npz, key, CROP, epoch)
        np.testing.assert_array_equal(video, frames, key)
        np.testing.assert_array_equal(mask, drawn, key)
        assert label == ["nongesture", "gesture"].index(key.split("/")[1])


def test_evaluation_shows_the_whole_frame_and_the_middle_of_each_segment(loader: str, home: Path, npz: Path) -> None:
    with opened(home, loader, "val", WHOLE) as made:
        found = by_key(made.evaluation())
    assert list(found) == keys_of(npz, "val")
    for key, (video, mask, _) in found.items():
        frames, drawn = expected_clip(npz, key, WHOLE, None)
        np.testing.assert_array_equal(video, frames, key)
        np.testing.assert_array_equal(mask, drawn, key)


@pytest.mark.parametrize("num_frames", [9, 20])
def test_padding_is_never_seen_and_too_few_frames_are_repeated_in_order(loader: str, home: Path, npz: Path, num_frames: int) -> None:
    spec = ClipSpec(num_frames, STORED.height, STORED.width)
    with opened(home, loader, spec=spec, augment=AugmentConfig(crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3), hflip=0)) as made:
        runs = [by_key(made.training(0)), by_key(made.evaluation())]
    num_padded = 0
    for found in runs:
        for key, (video, _, _) in found.items():
            with np.load(npz / f"{key}.npz") as arrays:
                source = arrays["video"]
            places = [next(place for place in range(9) if np.array_equal(frame, source[place])) for frame in video]
            valid = 9 if source[-1].any() else 7
            num_padded += valid == 7
            assert places == sorted(places) and set(places) == set(range(valid))
    assert num_padded > 4


@pytest.mark.parametrize("size", [(10, 10), (24, 32), (31, 47)])
def test_points_are_drawn_after_crop_resize_and_flip(loader: str, home: Path, npz: Path, size: tuple[int, int]) -> None:
    spec, augment = ClipSpec(4, *size), AugmentConfig()
    with opened(home, loader, spec=spec, augment=augment) as made:
        found = by_key(made.training(2))
    num_ones = 0
    for key, (video, mask, _) in found.items():
        frames, drawn = expected_clip(npz, key, spec, 2, augment)
        np.testing.assert_array_equal(mask, drawn, key)
        assert np.abs(video - by_hand.bilinear(frames, size)).max() < 1.5  # rounded once for each direction
        num_ones += int(mask.sum())
    assert num_ones > 100


def test_a_clip_without_keypoints_has_a_mask_of_zeros_and_others_have_ones(loader: str, home: Path, npz: Path) -> None:
    with opened(home, loader, spec=WHOLE) as made:
        found = by_key(made.evaluation())
    for key, (_, mask, _) in found.items():
        with np.load(npz / f"{key}.npz") as arrays:
            assert mask.any() == ("keypoints" in arrays)


def test_no_mask_is_made_unless_asked_for(loader: str, home: Path) -> None:
    with opened(home, loader, with_points=False) as made:
        assert all(batch.keypoints is None for batch in made.training(0))


def test_batches_kept_for_an_epoch_are_not_written_over(loader: str, home: Path) -> None:
    with opened(home, loader) as made:
        kept = list(made.training(0))
        kept_masks = [batch.keypoints.clone() for batch in kept if batch.keypoints is not None]
        again = [batch.video.clone() for batch in made.training(0)]
        list(made.training(1))
    assert len({batch.video.untyped_storage().data_ptr() for batch in kept}) == len(kept)
    for batch, video, mask in zip(kept, again, kept_masks, strict=True):
        assert torch.equal(batch.video, video) and batch.keypoints is not None and torch.equal(batch.keypoints, mask)


@pytest.mark.parametrize(("threads", "prefetch", "micro_batch", "look_ahead"), [(1, 1, 4, 0), (5, 4, 1, 2), (2, 9, 2, 3), (3, 1, 2, 1000)])
def test_threads_prefetch_micro_batch_and_look_ahead_change_no_clip(
    loader: str, home: Path, threads: int, prefetch: int, micro_batch: int, look_ahead: int
) -> None:
    with opened(home, loader) as made, opened(home, loader, "train", CROP, 4, micro_batch, 0, 1, threads, prefetch, look_ahead=look_ahead) as other:
        assert_same(by_key(made.training(0)), by_key(other.training(0)))


@pytest.mark.parametrize("look_ahead", [0, 2, 32])
def test_a_process_beside_gives_the_very_bytes_that_threads_give(loader: str, home: Path, look_ahead: int) -> None:
    spec, augment = ClipSpec(5, 14, 15), AugmentConfig()
    with opened(home, loader, spec=spec, augment=augment) as threads:
        expected = [list(threads.training(1)), list(threads.training(0, consumed=8)), list(threads.evaluation())]
    with opened(home, loader, spec=spec, augment=augment, decode_in="process", look_ahead=look_ahead) as beside:
        found = [list(beside.training(1)), list(beside.training(0, consumed=8)), list(beside.evaluation())]
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(by_key(ours), by_key(theirs))
        for one, other in zip(ours, theirs, strict=True):
            assert (one.number, one.position, one.labels, one.proof, one.bad) == (other.number, other.position, other.labels, other.proof, other.bad)
            assert torch.equal(one.weight, other.weight) and one.video.is_contiguous()


def test_a_resume_at_every_step_gives_the_same_tail(loader: str, home: Path) -> None:
    with opened(home, loader) as made:
        whole = by_key(made.training(1))
        for step in range(6):
            tail = dict(list(whole.items())[4 * step :])
            assert_same(by_key(made.training(1, consumed=4 * step)), tail)


def test_two_ranks_together_give_the_clips_of_one(loader: str, home: Path) -> None:
    with opened(home, loader) as one, opened(home, loader, rank=0, world_size=2) as first, opened(home, loader, rank=1, world_size=2) as second:
        for single, ranks in (
            (one.training(0), [first.training(0), second.training(0)]),
            (one.evaluation(), [first.evaluation(), second.evaluation()]),
        ):
            halves, batches = [list(rank) for rank in ranks], list(single)
            assert places(chain(*halves)) == places(batches)
            together, whole = [by_key(rank) for rank in halves], by_key(batches)
            assert sorted([*together[0], *together[1]]) == sorted(whole)
            assert_same({key: (together[0] | together[1])[key] for key in whole}, whole)


def places(batches: Iterable[Batch]) -> list[tuple[int, str]]:
    """Each clip's place in the order of all ranks, with its key."""
    return sorted(pair for batch in batches for pair in zip(batch.position, batch.key, strict=True))


def test_a_subset_is_ordered_by_itself_and_keeps_the_clips_own_chance(loader: str, home: Path, npz: Path) -> None:
    keys = keys_of(npz)
    with opened(home, loader) as made:
        chosen = fraction(made.source.facts, 0.5)
        whole = by_key(made.training(0))
    with opened(home, loader, subset=chosen) as part:
        found = by_key(part.training(0))
        numbers = [number for batch in part.training(0) for number in batch.number]
    assert list(found) == [keys[chosen[number]] for number in by_hand.permutation(11, "order", SEED, 0)][:8] == [keys[number] for number in numbers]
    shared = found.keys() & whole.keys()
    assert_same({key: found[key] for key in shared}, {key: whole[key] for key in shared})


def test_a_fraction_is_the_same_of_every_kind_of_home(loader: str, home: Path, npz: Path) -> None:
    source = open_source(home, "train", loader)
    chosen = [source.facts[number].key for number in fraction(source.facts, 0.3)]
    source.close()
    by_class = [sorted((key for key in keys_of(npz) if f"/{name}/" in key), key=lambda key: hash64("fraction", key)) for name in ("gesture", "nongesture")]
    assert chosen == sorted(by_class[0][:3] + by_class[1][:4])  # .3 of 9 and of 12, rounded up


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_the_order_and_the_clips_are_the_same_from_npz_and_from_shards_of_any_size(codec: str, base: Path) -> None:
    many, one = (shards(base, codec, mib) for mib in (MANY_SHARDS_MIB, ONE_SHARD_MIB))
    assert len(read_manifest(many).splits["train"].shards) > 3 and len(read_manifest(one).splits["train"].shards) == 1
    with opened(npz_home(base)) as snippets, opened(many) as in_many, opened(one) as in_one:
        for epoch in (0, 1):
            expected = by_key(snippets.training(epoch))
            found = by_key(in_many.training(epoch))
            assert_same(found, by_key(in_one.training(epoch)))
            if codec == "zstd":
                assert_same(found, expected)
            assert_near(found, expected)


def assert_near(found: Found, expected: Found) -> None:
    """Keys, labels and masks the same; pixels as near as JPEG keeps them."""
    assert list(found) == list(expected)
    for key, (video, mask, label) in found.items():
        difference = np.abs(video.astype(int) - expected[key][0])
        assert difference.max() <= LARGEST_JPEG_ERROR and difference.mean() <= MEAN_JPEG_ERROR
        np.testing.assert_array_equal(mask, expected[key][1])
        assert label == expected[key][2]


def test_points_follow_frames_that_were_stored_smaller(base: Path) -> None:
    """24x32 stored as 16x21: the view is of the stored frame, the points of the source."""
    spec, source = ClipSpec(4, 16, 21), (STORED.height, STORED.width)
    with opened(shards(base, "jpeg", ONE_SHARD_MIB, store_size=16), spec=spec, augment=AugmentConfig()) as made:
        assert made.source.stored == ClipSpec(9, 16, 21) and made.source.source == STORED
        found = by_key(made.training(0))
    for key, (video, mask, _) in found.items():
        view = by_hand.view(16, 21, by_hand.uniforms(41, "view", SEED, 0, key, 0), (0.5, 1), (3 / 4, 4 / 3), 0.5)
        with np.load(npz_home(base) / f"{key}.npz") as arrays:
            whole, ones = arrays["video"], arrays.get("keypoints", np.zeros(STORED.mask_shape, np.uint8))
        valid = 9 if whole[-1].any() else 7
        chosen = by_hand.frames(4, valid, by_hand.uniforms(4, "frames", SEED, 0, key, 0))
        points = [(place, int(y), int(x)) for place, frame in enumerate(chosen) for y, x in zip(*np.nonzero(ones[frame]), strict=True)]
        np.testing.assert_array_equal(mask, by_hand.mask(points, view[:4], view[4], (16, 21), source, spec.mask_shape), key)
        small = by_hand.bilinear(whole[chosen], (16, 21))[:, view[0] : view[0] + view[2], view[1] : view[1] + view[3]]
        shown = by_hand.bilinear(small, (16, 21))
        assert np.abs(video - (shown[:, :, ::-1] if view[4] else shown)).mean() < 8
