"""The same model with the same weights in two training steps: ours, as train.py takes it, and plain transformers, written with care.

    ours   uint8 (B, T, H, W, 3) -> our model -> loss -> gradients -> Precision.step
    plain  uint8 (B, T, 3, H, W) -> float32, normalised -> transformers' model -> loss -> backward -> the same update

Both have autocast, gradients clipped to 1, fused AdamW, and never wait for the GPU. transformers' own Trainer does wait, in each step
(its filter of losses that are not finite), so the plain side here is rather faster than what most people run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Literal, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TimesformerForVideoClassification, VideoMAEForVideoClassification
from transformers.models.videomae import modeling_videomae

from clips.clip import ClipSpec
from clips.mix import hash64
from loaders.batch import Batch, Slowest
from models import MODELS, ModelConfig, architecture_of, build_model
from models.build import from_checkpoint
from models.checkpoints import Checkpoint
from models.classifier import ClipClassifier
from models.folder import RANDOM
from models.pixels import Pixels
from training.distributed import Group
from training.meter import Meter
from training.optimizer import OptimizerConfig, build_optimizer, groups_of, set_lr
from training.precision import Precision
from training.step import choose_micro_batch, gradients
from training.watch import Watch

Geometry = Literal["native", "full"]
CLASSES = ("nongesture", "gesture")
STORED, QUICK_STORED = ClipSpec(39, 320, 320), ClipSpec(18, 80, 80)  # what geometry full takes
LR = 1e-5  # random weights stay finite for hundreds of steps
RECIPE = OptimizerConfig()
VIT_B = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BASES = {
    "videomae-base": {**VIT_B, "model_type": "videomae", "num_frames": 16, "tubelet_size": 2, "use_mean_pooling": True},
    "timesformer-base": {**VIT_B, "model_type": "timesformer", "num_frames": 8, "attention_type": "divided_space_time"},
}


def random_model(name: str, geometry: Geometry, source: ClipSpec) -> ClipClassifier:
    """A published architecture (`BASES`) or one of ours with random, seeded weights: nothing is downloaded."""
    config = ModelConfig(name, geometry=geometry, channel_order="rgb", head_init_scale=1.0)
    if name in MODELS:
        return build_model(config, CLASSES, source)
    checkpoint = Checkpoint(RANDOM, Path(), dict(BASES[name]), None)
    return from_checkpoint(architecture_of(checkpoint), checkpoint, config, CLASSES, source)


class Side(Protocol):
    """One model in one kind of step."""

    optimizer: torch.optim.Optimizer

    @property
    def module(self) -> nn.Module:
        """What is called, and may be compiled."""

    def largest(self, batch_size: int, group: Group) -> int:
        """The clips that fit at once: all on a CPU, on a GPU the largest divisor of `batch_size` that does."""

    def batch(self, size: int) -> Batch:
        """Random clips on the device."""

    def step(self, forward: nn.Module, batch: Batch) -> None:
        """One update; `forward` is `module`, or that compiled. Nothing waits for the device."""

    def loss(self) -> float | None:
        """The mean of all finite losses since the last call, None where one was not finite: waits for the device."""


@dataclass
class Ours:
    """Our classifier in the step of train.py, its log's sums on the device included; the recipe is plain: nothing mixed, no layer decay."""

    model: ClipClassifier
    precision: Precision

    def __post_init__(self) -> None:
        self.model.to(self.precision.device).train()
        self.optimizer = build_optimizer(self.model, RECIPE, self.model.layer_of, self.model.num_layers)
        self._group = Group(0, 1, 0, self.precision.device, "single")
        self._watch, self._meter, self._number = Watch(self.precision.device, self.precision.mode != "fp16"), Meter(), 0

    @property
    def module(self) -> nn.Module:
        return self.model

    def largest(self, batch_size: int, group: Group) -> int:
        make_room = partial(self.model.checkpoint_activations, True)
        return choose_micro_batch(self.model, self.model.spec.video_shape, batch_size, 1, self.precision, group, None, make_room)

    def batch(self, size: int) -> Batch:
        return cached_batch((size, *self.model.spec.video_shape), self.precision.device)

    def step(self, forward: nn.Module, batch: Batch) -> None:
        set_lr(self.optimizer, LR)
        torch.manual_seed(hash64("step", 0, self._number, 0) >> 1)
        loss = gradients(forward, repeat(batch), 1, len(batch), self.precision, self._meter)
        norm = self.precision.step(self.optimizer, self.model.parameters(), RECIPE.clip_grad)
        self.optimizer.zero_grad(set_to_none=True)
        self._watch.add(loss, norm, batch.key)
        self._meter.step(len(batch))
        self._number += 1

    def loss(self) -> float | None:
        seen = self._watch.read(self._group)
        return None if seen.skipped else seen.loss


@dataclass
class Plain:
    """transformers' own classifier, made from our model: the same config, the same weights."""

    model: ClipClassifier  # only read
    precision: Precision

    def __post_init__(self) -> None:
        self.module: nn.Module = PlainClassifier(plain_model(self.model), self.model.pixels).to(self.precision.device).train()
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups_of(self.module, RECIPE, lambda name: 0, 1)]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)  # as transformers' Trainer does
        self._total, self._num = torch.zeros((), device=self.precision.device), 0

    @property
    def _shape(self) -> tuple[int, ...]:
        frames, height, width, channels = self.model.spec.video_shape
        return frames, channels, height, width

    def largest(self, batch_size: int, group: Group) -> int:
        return choose_micro_batch(self.module, self._shape, batch_size, 1, self.precision, group, None)

    def batch(self, size: int) -> Batch:
        return cached_batch((size, *self._shape), self.precision.device)

    def step(self, forward: nn.Module, batch: Batch) -> None:
        with self.precision.autocast():
            loss = F.cross_entropy(forward(batch.video), batch.label)
        self.precision.backward(loss)
        self.precision.step(self.optimizer, self.module.parameters(), RECIPE.clip_grad)
        self.optimizer.zero_grad(set_to_none=True)
        self._total += loss.detach()
        self._num += 1

    def loss(self) -> float | None:
        mean = self._total.item() / max(self._num, 1)
        self._total.zero_()
        self._num = 0
        return mean if abs(mean) < float("inf") else None


class PlainClassifier(nn.Module):
    """Logits (B, K) of uint8 (B, T, 3, H, W) clips, normalised on their device."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, pixels: Pixels) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", pixels.mean), ("std", pixels.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        return self.model(pixel_values=video.float().div_(255).sub_(self.mean).div_(self.std)).logits


def plain_model(model: ClipClassifier) -> nn.Module:
    """transformers' own class with the config and the weights of ours, and its table of positions where that is no weight."""
    config = type(model.config)(**model.config.to_dict())
    if config.model_type == "timesformer":
        plain: nn.Module = TimesformerForVideoClassification(config)
    else:
        table = model.get_buffer("videomae.embeddings.position_embeddings").cpu()  # where transformers keeps it, too
        with patch.object(modeling_videomae, "get_sinusoid_encoding_table", lambda *_: table):  # in numpy, 14 s at 40 x 320 (measured)
            plain = VideoMAEForVideoClassification(config)
    plain.load_state_dict(model.state_dict())
    return plain


def cached_batch(shape: tuple[int, ...], device: torch.device) -> Batch:
    """Random bytes and labels of both classes, the same for the same shape."""
    generator = torch.Generator(device).manual_seed(0)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    num = shape[0]
    label = (torch.arange(num) % len(CLASSES)).to(device)
    keys, places = [f"cached/{number}" for number in range(num)], range(num)
    return Batch(video, None, label, torch.ones(num, device=device), keys, places, places, label.tolist(), 0, [], Slowest("", "", 0.0))


def resident(side: Side, batch: Batch) -> Iterator[Tensor]:
    """What lies in memory between two steps."""
    yield from side.module.parameters()
    yield from side.module.buffers()
    for state in side.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    yield batch.video
