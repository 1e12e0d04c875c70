"""Mixup and cutmix on the clips of a batch, in bytes on their device, and the loss of the soft targets that come of it.

clips, joints, labels -> pairs -> blended (mixup) or with one box exchanged in all frames (cutmix) -> clips, joints, targets
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from clips.errors import InputError
from clips.mix import uniforms

SHARES = 128  # a blend is a whole number of 128ths: with bytes exact in 16 bits, so that a CPU and a GPU give the same
BETA_TRIES = 32  # for an alpha of 1 half of the tries succeed: all fail in one of 4 billion pairs
PAIR_DRAWS = 3 + 2 * BETA_TRIES  # mixup or cutmix; the box down and across; the share
SMALLEST_ALPHA, LARGEST_ALPHA = 0.1, 2.0


@dataclass(frozen=True)
class MixConfig:
    """What the model is told to answer: mixed clips, softened labels, weighted classes."""

    mixup: float = 0.0
    """Blend pairs of clips, with shares from Beta(this, this); 0 is off, 0.8 is VideoMAE's."""
    cutmix: float = 0.0
    """Exchange a box between pairs of clips, with shares of the area from Beta(this, this); 0 is off. With mixup too, each pair gets one of them."""
    smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class counts the more the rarer it is in training, in the mean over the clips 1."""

    def __post_init__(self) -> None:
        for flag, alpha in (("--mixup", self.mixup), ("--cutmix", self.cutmix)):
            if alpha and not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
                raise InputError(f"{flag} {alpha}: expected 0 (off) or {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g}.")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"--smoothing {self.smoothing}: expected 0 to below 1.")
        if self.class_weights not in ("none", "balanced"):
            raise InputError(f"--class-weights {self.class_weights}: expected none or balanced.")

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0


class Placed(Protocol):
    """A clip's place in the epoch's order over all ranks."""

    @property
    def position(self) -> int: ...


class Labelled(Protocol):
    """A batch's video uint8 (B, T, H, W, 3), keypoints 0/1 uint8 (B, T, H, W) or None, and label int64 (B,)."""

    @property
    def video(self) -> torch.Tensor: ...

    @property
    def keypoints(self) -> torch.Tensor | None: ...

    @property
    def label(self) -> torch.Tensor: ...


class Mixable(Labelled, Protocol):
    """Also the places in the order, and the clips that could not be read."""

    @property
    def position(self) -> Sequence[int]: ...

    @property
    def bad(self) -> Sequence[Placed]: ...


@dataclass(frozen=True)
class Mix:
    """How one pair is mixed: `share` of each clip is its own. Mixup: of all its pixels, in 128ths; cutmix: those outside the box."""

    share: float
    box: tuple[slice, slice] | None


@dataclass(frozen=True)
class Mixing:
    """Mixes micro-batches, and gives their targets.

    Partners stand `repeats` places apart in the order of all ranks, so never two repeats of one clip; the pairs of a step have their chance from
    (seed, epoch, step). With micro-batches of whole pairs a clip's partner hangs neither on ranks nor on the micro-batch's size.
    """

    config: MixConfig
    num_classes: int
    batch_size: int
    seed: int
    repeats: int = 1

    @property
    def unit(self) -> int:
        """What a micro-batch must be a multiple of: the clips of a pair and of all their repeats, 1 where nothing is mixed."""
        return 2 * self.repeats if self.config.mixes else 1

    def check(self, micro_batch: int) -> None:
        """Raises InputError where a micro-batch cuts through pairs."""
        if micro_batch % self.unit:
            repeats = f" of {self.repeats} repeats each" if self.repeats > 1 else ""
            raise InputError(
                f"--micro-batch {micro_batch}: expected a multiple of {self.unit}, the pairs{repeats} that are mixed. "
                "Change --batch-size or --micro-batch, or turn it off with --mixup 0 --cutmix 0."
            )

    @torch.no_grad()
    def __call__(self, batch: Mixable, epoch: int) -> torch.Tensor:
        """Mixes the batch's clips and joints in place, and gives its targets, float32 (B, K). Clips that could not be read stay alone."""
        targets = soft_targets(batch.label, self.config.smoothing, self.num_classes)
        if not self.config.mixes:
            return targets
        bad = {clip.position for clip in batch.bad}
        for first, second, mix in self.pairs(batch.position, epoch, (batch.video.shape[2], batch.video.shape[3])):
            if bad.isdisjoint((batch.position[first], batch.position[second])):
                _mix_pixels(batch.video[first], batch.video[second], mix)
                if batch.keypoints is not None:
                    _mix_joints(batch.keypoints[first], batch.keypoints[second], mix)
                own, other = targets[first].clone(), targets[second].clone()
                targets[first], targets[second] = torch.lerp(other, own, mix.share), torch.lerp(own, other, mix.share)
        return targets

    def pairs(self, positions: Sequence[int], epoch: int, size: tuple[int, int]) -> list[tuple[int, int, Mix]]:
        """Both places in the micro-batch and the mix of every pair; ValueError for positions that are not those of whole pairs of one step."""
        block = 2 * self.repeats
        step, begin = divmod(positions[0], self.batch_size)
        if begin % block or len(positions) % block or list(positions) != list(range(positions[0], positions[0] + len(positions))):
            raise ValueError(f"positions {positions[0]} to {positions[-1]} are not whole pairs of {block} clips")
        draws = uniforms(self.batch_size // 2 * PAIR_DRAWS, "mix", self.seed, epoch, step).reshape(-1, PAIR_DRAWS)
        firsts = [place + repeat for place in range(0, len(positions), block) for repeat in range(self.repeats)]
        return [(first, first + self.repeats, self._mix(draws[begin // 2 + number], size)) for number, first in enumerate(firsts)]

    def _mix(self, draws: np.ndarray, size: tuple[int, int]) -> Mix:
        config = self.config
        is_cut = config.cutmix > 0 and (config.mixup == 0 or draws[0] < 0.5)
        share = beta(config.cutmix if is_cut else config.mixup, draws[3:])
        if not is_cut:
            return Mix(round(share * SHARES) / SHARES, None)
        box = random_box(share, (float(draws[1]), float(draws[2])), size)
        area = math.prod(stretch.stop - stretch.start for stretch in box)
        return Mix(1 - area / math.prod(size), box)


def random_box(share: float, centre: tuple[float, float], size: tuple[int, int]) -> tuple[slice, slice]:
    """A box about `centre` (0 … 1) that leaves `share` of a frame of `size` (height, width), cut at its edges (Yun et al. 2019)."""
    side = math.sqrt(1 - share)
    halves = [int(length * side) // 2 for length in size]
    middles = [int(place * length) for place, length in zip(centre, size, strict=True)]
    down, across = (slice(max(0, middle - half), min(length, middle + half)) for middle, half, length in zip(middles, halves, size, strict=True))
    return down, across


def beta(alpha: float, draws: np.ndarray) -> float:
    """A number from Beta(alpha, alpha) by Jöhnk's rejection (1964), alpha at most 2; `draws` (2 n,) are n tries, a half where none succeeds."""
    ours, theirs = (draws.reshape(-1, 2) ** (1 / alpha)).T
    total = ours + theirs
    taken = np.flatnonzero((total <= 1) & (total > 0))
    return float(ours[taken[0]] / total[taken[0]]) if len(taken) else 0.5


def _mix_pixels(one: torch.Tensor, other: torch.Tensor, mix: Mix) -> None:
    """Two clips uint8 (T, H, W, 3), in place; a blend is rounded, halves up."""
    if mix.box:
        _exchange(one, other, mix.box)
        return
    own = round(mix.share * SHARES)
    mixed = [a.to(torch.int16).mul_(own).add_(b, alpha=SHARES - own).add_(SHARES // 2).bitwise_right_shift_(7) for a, b in ((one, other), (other, one))]
    one.copy_(mixed[0])
    other.copy_(mixed[1])


def _mix_joints(one: torch.Tensor, other: torch.Tensor, mix: Mix) -> None:
    """Two masks (T, H, W), in place: cut as the pixels are, and of a blend, in which both are seen, the joints of both."""
    if mix.box:
        _exchange(one, other, mix.box)
    else:
        one |= other
        other.copy_(one)


def _exchange(one: torch.Tensor, other: torch.Tensor, box: tuple[slice, slice]) -> None:
    place = (slice(None), *box)
    kept = one[place].clone()
    one[place] = other[place]
    other[place] = kept


def soft_targets(label: torch.Tensor, smoothing: float, num_classes: int) -> torch.Tensor:
    """float32 (B, K) of int64 (B,): 1 - smoothing for the label, and smoothing spread evenly over all classes (Szegedy et al. 2016)."""
    return F.one_hot(label, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def losses(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Each clip's cross entropy (B,) in float32, classes weighted by `weights` (K,); targets are shares (B, K), or labels (B,)."""
    return F.cross_entropy(logits.float(), targets, weight=weights, reduction="none")


def balanced_weights(class_counts: Sequence[int]) -> list[float]:
    """Clips / (classes x clips of the class): 1 in the mean over the clips; a class without clips counts as one of a single clip."""
    counts = [max(count, 1) for count in class_counts]
    return [sum(counts) / (len(counts) * count) for count in counts]
