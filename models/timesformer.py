"""TimeSformer: patches of single frames, attention over time, then over space; a class token, learned positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TimesformerConfig, TimesformerForVideoClassification

from .checkpoints import Checkpoint, read_checkpoint
from .classifier import TINY, ClipClassifier, from_checkpoint, pair
from .config import ModelConfig
from .folder import RANDOM
from .hub import HUB_IDS
from .patches import FoldedPatch
from .pixels import FAMILIES, Pixels


class TimeSformer(ClipClassifier, TimesformerForVideoClassification):
    """transformers' TimeSformer with its keys and shapes, fed with uint8 clips."""

    plain_name = "TimesformerForVideoClassification"
    shaping = ("attention_type", "qkv_bias")

    def __init__(self, config: TimesformerConfig, pixels: Pixels) -> None:
        super().__init__(config)
        embeddings = self.timesformer.embeddings
        embeddings.add_module("patch_embeddings", FramePatches(config, embeddings.patch_embeddings.projection, pixels))

    @classmethod
    def make_config(cls, values: Mapping[str, Any], trained_head: bool) -> TimesformerConfig:
        """transformers' TimeSformer takes square pictures and patches as numbers only, and its space_only returns a row for each frame."""
        values = dict(values)
        for name in ("image_size", "patch_size"):
            height, width = pair(values.get(name, getattr(TimesformerConfig, name)))
            if height != width:
                raise ValueError(f"{name} {height}x{width}, expected a square")
            values[name] = height
        if values.get("attention_type") == "space_only":
            raise ValueError("attention_type space_only, expected divided_space_time or joint_space_time")
        return TimesformerConfig(**values)


class FramePatches(nn.Module):
    """uint8 clips to the tokens of each frame, (B * T, P, D), with T and the patches in a row, as transformers' embeddings want them."""

    def __init__(self, config: TimesformerConfig, conv: nn.Conv2d, pixels: Pixels) -> None:
        super().__init__()
        self.patches_in_row = pair(config.image_size)[1] // pair(config.patch_size)[1]
        self.num_patches = self.patches_in_row**2
        self.projection = FoldedPatch(conv, pixels)

    def forward(self, video: Tensor) -> tuple[Tensor, int, int]:
        num_frames = video.shape[1]
        tokens = self.projection(video)  # (B, T * P, D)
        return tokens.unflatten(1, (num_frames, self.num_patches)).flatten(0, 1), num_frames, self.patches_in_row


def pretrained(config: ModelConfig, class_names: Sequence[str]) -> TimeSformer:
    """ViT-B with divided attention, fine-tuned to Something-Something V2 (from BGR pixels)."""
    return from_checkpoint(TimeSformer, read_checkpoint(HUB_IDS["timesformer"]), config, class_names)


def tiny(config: ModelConfig, class_names: Sequence[str]) -> TimeSformer:
    """8 frames of 64 px, 0.8 M random weights, BGR as its family."""
    values = {**TINY, "model_type": "timesformer", "num_frames": 8}
    processor = {"channel_order": FAMILIES["timesformer"].channel_order}
    return from_checkpoint(TimeSformer, Checkpoint(RANDOM, Path(), values, None, processor, "its family"), config, class_names)
