"""Mixup, cutmix and soft targets: against numpy, scipy and sklearn, and the same however a step is cut into ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.utils.class_weight import compute_class_weight

from clips.errors import InputError
from loaders.batch import BadClip
from tests import by_hand
from training.mixing import PAIR_DRAWS, Mix, MixConfig, Mixing, balanced_weights, beta, losses, random_box, soft_targets

often = settings(max_examples=50, deadline=None)
SIZE = (10, 14)
BOTH = MixConfig(mixup=0.8, cutmix=1.0, smoothing=0.1)
on_both = pytest.mark.parametrize("config", [MixConfig(mixup=0.8), MixConfig(cutmix=1.0), BOTH])


@dataclass
class Small:
    """As much of a batch as mixing uses."""

    video: torch.Tensor
    keypoints: torch.Tensor | None
    label: torch.Tensor
    position: list[int]
    bad: list[BadClip] = field(default_factory=list)

    def part(self, begin: int, end: int) -> Small:
        """A micro-batch of copies."""
        masks = None if self.keypoints is None else self.keypoints[begin:end].clone()
        places = self.position[begin:end]
        return Small(self.video[begin:end].clone(), masks, self.label[begin:end], places, [clip for clip in self.bad if clip.position in places])

    def copy(self) -> Small:
        return self.part(0, len(self.position))


def batch_of(num_clips: int, begin: int = 0, seed: int = 0) -> Small:
    """Noise, with joints in a twentieth of the pixels, of three classes."""
    rng = np.random.RandomState(seed)
    video = torch.from_numpy(rng.randint(0, 256, (num_clips, 2, *SIZE, 3), np.uint8))
    masks = torch.from_numpy((rng.rand(num_clips, 2, *SIZE) < 0.05).astype(np.uint8))
    return Small(video, masks, torch.from_numpy(rng.randint(0, 3, num_clips)), list(range(begin, begin + num_clips)))


def mixing(config: MixConfig, batch_size: int, repeats: int = 1) -> Mixing:
    return Mixing(config, 3, batch_size, seed=7, repeats=repeats)


def expected_pair(batch: Small, first: int, second: int, mix: Mix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What becomes of the first clip, its mask and its unsmoothed target, in float64."""
    video, other = batch.video[first].numpy().astype(float), batch.video[second].numpy()
    assert batch.keypoints is not None
    mask, masked = batch.keypoints[first].numpy().copy(), batch.keypoints[second].numpy()
    if mix.box is None:
        video = np.floor(mix.share * video + (1 - mix.share) * other + 0.5)
        mask = np.maximum(mask, masked)
    else:
        video[:, mix.box[0], mix.box[1]] = other[:, mix.box[0], mix.box[1]]
        mask[:, mix.box[0], mix.box[1]] = masked[:, mix.box[0], mix.box[1]]
    eye = np.eye(3)
    return video, mask, mix.share * eye[batch.label[first]] + (1 - mix.share) * eye[batch.label[second]]


@on_both
@often
@given(seed=st.integers(0, 1000), epoch=st.integers(0, 5), repeats=st.sampled_from([1, 2, 3]))
def test_every_clip_its_joints_and_its_target_are_mixed_with_its_partners_as_numpy_does_it(config: MixConfig, seed: int, epoch: int, repeats: int) -> None:
    batch = batch_of(4 * repeats, begin=8 * repeats, seed=seed)
    mixed, make = batch.copy(), mixing(config, 4 * repeats, repeats)
    targets = make(mixed, epoch)
    assert mixed.video.dtype == torch.uint8 and targets.dtype == torch.float32
    pairs = make.pairs(batch.position, epoch, SIZE)
    assert sorted(place for first, second, _ in pairs for place in (first, second)) == list(range(4 * repeats))
    for first, second, mix in pairs:
        for one, other in ((first, second), (second, first)):
            video, mask, target = expected_pair(batch, one, other, mix)
            np.testing.assert_array_equal(mixed.video[one].numpy(), video)
            np.testing.assert_array_equal(mixed.keypoints[one].numpy(), mask)  # type: ignore[index]  # there are masks
            np.testing.assert_allclose(targets[one].numpy(), target * (1 - config.smoothing) + config.smoothing / 3, atol=1e-6)


def test_the_share_of_a_cut_pair_is_the_area_outside_the_box_that_is_the_same_in_all_frames() -> None:
    batch = batch_of(64)
    batch.video[::2], batch.video[1::2] = 0, 255
    batch.label[::2], batch.label[1::2] = 0, 1
    targets = mixing(MixConfig(cutmix=1.0), 64)(batch, 0)
    shares = (batch.video == 255).float().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(targets[:, 1], shares, atol=1e-6, rtol=0)
    assert torch.equal(batch.video[:, 0], batch.video[:, 1])
    assert ((shares[::2] > 0.1) & (shares[::2] < 0.9)).sum() > 10


def test_the_target_of_a_blend_is_the_share_of_its_pixels() -> None:
    batch = batch_of(64)
    batch.video[::2], batch.video[1::2] = 0, 128
    batch.label[::2], batch.label[1::2] = 0, 1
    targets = mixing(MixConfig(mixup=0.8), 64)(batch, 0)
    assert torch.equal(targets[:, 1] * 128, batch.video.flatten(1).float().mean(dim=1))
    assert len(set(targets[:, 1].tolist())) > 20


@on_both
@often
@given(st.integers(0, 1000), st.integers(0, 3), st.sampled_from([1, 2]))
def test_neither_ranks_nor_micro_batches_change_what_becomes_of_a_step(config: MixConfig, seed: int, step: int, repeats: int) -> None:
    size = 12 * repeats
    batch, make = batch_of(size, begin=step * size, seed=seed), mixing(config, size, repeats)
    whole = batch.copy()
    targets = make(whole, 3)
    for micro_batch in (2 * repeats, 4 * repeats, 6 * repeats):
        parts = [batch.part(begin, begin + micro_batch) for begin in range(0, size, micro_batch)]
        assert torch.equal(torch.cat([make(part, 3) for part in parts]), targets)
        assert torch.equal(torch.cat([part.video for part in parts]), whole.video)
        assert whole.keypoints is not None
        assert torch.equal(torch.cat([part.keypoints for part in parts if part.keypoints is not None]), whole.keypoints)


OTHERS = [(mixing(BOTH, 4), range(8, 12), 2), (mixing(BOTH, 4), range(4, 8), 1), (replace(mixing(BOTH, 4), seed=8), range(8, 12), 1)]


def test_chance_is_that_of_seed_epoch_and_step() -> None:
    """Step 2 of epoch 1, worked out again from the written-out uniforms."""
    found = mixing(BOTH, 4).pairs([8, 9, 10, 11], 1, SIZE)
    draws = np.array(by_hand.uniforms(2 * PAIR_DRAWS, "mix", 7, 1, 2)).reshape(2, -1)
    for (_, _, mix), row in zip(found, draws, strict=True):
        assert (mix.box is not None) == (row[0] < 0.5)
    later, earlier, reseeded = (make.pairs(places, epoch, SIZE) for make, places, epoch in OTHERS)
    for other in (later, earlier, reseeded):
        assert not {str(mix) for _, _, mix in other} & {str(mix) for _, _, mix in found}


def test_partners_are_never_repeats_of_one_clip() -> None:
    for repeats in (1, 2, 3):
        size = 4 * repeats
        for first, second, _ in mixing(BOTH, size, repeats).pairs(range(size), 0, SIZE):
            assert first // repeats != second // repeats


@on_both
def test_a_clip_that_cannot_be_read_and_its_partner_stay_alone(config: MixConfig) -> None:
    batch = batch_of(4, begin=4)
    batch.bad.append(BadClip(7, "k", "torn"))
    mixed = batch.copy()
    targets = mixing(config, 4)(mixed, 0)
    assert torch.equal(mixed.video[2:], batch.video[2:]) and not torch.equal(mixed.video[:2], batch.video[:2])
    assert torch.equal(targets[2:], soft_targets(batch.label[2:], config.smoothing, 3))


def test_with_both_half_of_the_pairs_are_cut() -> None:
    pairs = mixing(BOTH, 2000).pairs(range(2000), 0, SIZE)
    assert abs(sum(mix.box is not None for _, _, mix in pairs) - 500) < 4.5 * np.sqrt(250)


def test_blends_and_boxes_have_each_their_own_alpha() -> None:
    pairs = mixing(MixConfig(mixup=0.1, cutmix=2.0), 2000).pairs(range(2000), 0, (224, 224))
    extreme = [[min(mix.share, 1 - mix.share) < 0.1 for _, _, mix in pairs if (mix.box is None) is blended] for blended in (True, False)]
    # beta(.1, .1) has .80 of its weight there, beta(2, 2) has .056; boxes that the frame's edge cuts off leave more
    assert np.mean(extreme[0]) > 0.7 and np.mean(extreme[1]) < 0.3


def test_without_mixing_the_clips_are_untouched_and_may_be_any_number() -> None:
    batch = batch_of(3, begin=1)
    before = batch.copy()
    make = mixing(MixConfig(smoothing=0.3), 5)
    make.check(3)
    targets = make(batch, 0)
    assert torch.equal(batch.video, before.video)
    np.testing.assert_allclose(targets.numpy(), np.eye(3)[batch.label.numpy()] * 0.7 + 0.1, atol=1e-7)


def test_clips_without_masks_are_mixed_alike() -> None:
    batch = batch_of(4)
    with_masks, without = batch.copy(), replace(batch.copy(), keypoints=None)
    assert torch.equal(mixing(BOTH, 4)(with_masks, 0), mixing(BOTH, 4)(without, 0)) and torch.equal(with_masks.video, without.video)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    draws = np.array(by_hand.uniforms(3000 * 64, "beta")).reshape(3000, 64)
    found = np.array([beta(alpha, row) for row in draws])
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert found.min() >= 0 and found.max() <= 1


def test_where_every_try_fails_the_share_is_a_half() -> None:
    assert beta(2.0, np.full(64, 0.99)) == 0.5
    assert beta(0.1, np.zeros(64)) == 0.5


@often
@given(st.floats(0, 1), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(1, 50), st.integers(1, 50))
def test_a_box_lies_in_the_frame_and_is_no_larger_than_asked(share: float, down: float, across: float, height: int, width: int) -> None:
    rows, columns = random_box(share, (down, across), (height, width))
    assert 0 <= rows.start <= rows.stop <= height and 0 <= columns.start <= columns.stop <= width
    assert (rows.stop - rows.start) * (columns.stop - columns.start) <= (1 - share) * height * width + 1e-9


def test_a_box_in_the_middle_has_the_asked_area() -> None:
    assert random_box(0.75, (0.5, 0.5), (224, 224)) == (slice(56, 168), slice(56, 168))
    assert random_box(1.0, (0.5, 0.5), (224, 224)) == (slice(112, 112), slice(112, 112))
    assert random_box(0.0, (0.0, 0.5), (224, 224)) == (slice(0, 112), slice(0, 224))


@often
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_loss_of_unmixed_clips_is_torchs_with_its_own_smoothing(seed: int, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, label = torch.randn(6, 3, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    expected = F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses(logits, soft_targets(label, smoothing, 3)), expected)


def test_a_weighted_loss_is_worked_out_as_numpy_does_it() -> None:
    rng = np.random.RandomState(0)
    logits, targets, weights = rng.randn(5, 3), rng.dirichlet([1, 1, 1], 5), np.array([0.5, 2.0, 1.5])
    log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = losses(torch.tensor(logits, dtype=torch.bfloat16), torch.tensor(targets, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), -(weights * targets * log).sum(axis=1), rtol=3e-2)
    exact = losses(torch.tensor(logits, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32))
    np.testing.assert_allclose(exact.numpy(), -(weights * targets * log).sum(axis=1), rtol=1e-5)


def test_the_loss_of_a_mixed_pair_lies_between_those_of_its_labels() -> None:
    logits, one, other = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0]), torch.tensor([1])
    mixed = 0.25 * soft_targets(one, 0, 3) + 0.75 * soft_targets(other, 0, 3)
    torch.testing.assert_close(losses(logits, mixed), 0.25 * F.cross_entropy(logits, one)[None] + 0.75 * F.cross_entropy(logits, other)[None])


@often
@given(st.lists(st.integers(1, 500), min_size=1, max_size=5))
def test_balanced_weights_are_sklearns(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    found = balanced_weights(counts)
    np.testing.assert_allclose(found, compute_class_weight("balanced", classes=np.arange(len(counts)), y=labels))
    assert np.mean(np.array(found)[labels]) == pytest.approx(1)


def test_a_class_without_clips_has_a_weight_too() -> None:
    assert balanced_weights([3, 0]) == [4 / 6, 2.0]


def test_micro_batches_that_cut_through_pairs_are_an_error_before_and_in_training() -> None:
    mixing(BOTH, 8, 2).check(4)
    for micro_batch, repeats in ((1, 1), (3, 1), (2, 2), (6, 2)):
        with pytest.raises(InputError, match=f"--micro-batch {micro_batch}: expected a multiple of {2 * repeats}"):
            mixing(BOTH, 24, repeats).check(micro_batch)
    for positions in ([0, 1, 2], [1, 2], [0, 2]):
        with pytest.raises(ValueError, match="not whole pairs"):
            mixing(BOTH, 4).pairs(positions, 0, SIZE)


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--mixup", {"mixup": -0.1}),
        ("--mixup", {"mixup": float("nan")}),
        ("--cutmix", {"cutmix": 3.0}),
        ("--smoothing", {"smoothing": 1.0}),
        ("--class-weights", {"class_weights": "some"}),
    ],
)
def test_a_wrong_value_names_its_flag(flag: str, changes: dict) -> None:
    with pytest.raises(InputError, match=rf"^{flag} "):
        MixConfig(**changes)


@pytest.mark.gpu
@on_both
def test_a_gpu_mixes_to_the_bytes_of_the_cpu(config: MixConfig) -> None:
    batch = batch_of(8)
    there = replace(batch.copy(), video=batch.video.cuda(), keypoints=batch.keypoints.cuda(), label=batch.label.cuda())  # type: ignore[union-attr]  # masks
    targets = mixing(config, 8)(there, 0)
    assert torch.equal(mixing(config, 8)(batch, 0), targets.cpu()) and torch.equal(batch.video, there.video.cpu())
