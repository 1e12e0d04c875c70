"""TimeSformer: patches of single frames, attention over time, then over space; a class token, learned positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TimesformerConfig, TimesformerForVideoClassification

from clips.clip import ClipSpec
from clips.errors import InputError

from .attention import JointAttention
from .build import TINY, from_checkpoint
from .checkpoints import Checkpoint, read_checkpoint
from .classifier import ClipClassifier, pair
from .config import ModelConfig
from .drop_path import DropPath, DroppedLinear, after, drop_rates
from .folder import RANDOM
from .hub import HUB_IDS
from .patches import FoldedPatch
from .pixels import FAMILIES, Pixels
from .positions import resize_grid


class TimeSformer(ClipClassifier, TimesformerForVideoClassification):
    """transformers' TimeSformer with its keys and shapes, fed with uint8 clips."""

    plain_name = "TimesformerForVideoClassification"
    shaping = ("attention_type", "qkv_bias")

    def __init__(self, config: TimesformerConfig, pixels: Pixels) -> None:
        super().__init__(config)
        patches: Any = self.timesformer.embeddings.patch_embeddings  # Any: its projection becomes another class
        patches.projection = FoldedPatch(patches.projection, pixels)
        for layer in self.layers:
            for owner in (layer.attention, layer.temporal_attention) if self._divided else (layer.attention,):
                owner.attention = JointAttention(owner.attention, config.num_attention_heads, config.attention_probs_dropout_prob)

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

    @property
    def projection(self) -> FoldedPatch:
        projection: Any = self.timesformer.embeddings.patch_embeddings.projection  # Any: transformers declares a convolution
        return projection

    @property
    def layers(self) -> list[Any]:
        return list(self.timesformer.encoder.layer)

    def adapt(self, spec: ClipSpec) -> None:
        """Its learned positions, interpolated, become the parameters, so that plain transformers reads a saved folder exactly."""
        if spec.height != spec.width:
            raise InputError(f"--geometry: TimeSformer takes square frames; found {spec}. Give --size {spec.height} or another --model-name.")
        embeddings, old, new = self.timesformer.embeddings, self.patch.grid(self.spec), self.patch.grid(spec)
        if old == new:
            return
        places, times = embeddings.position_embeddings, embeddings.time_embeddings
        grown = torch.cat([places[:, :1], resize_grid(places[:, 1:], (1, *old[1:]), (1, *new[1:]))], dim=1)
        embeddings.position_embeddings = nn.Parameter(grown.detach())
        embeddings.time_embeddings = nn.Parameter(resize_grid(times, (old[0], 1, 1), (new[0], 1, 1)).detach())
        embeddings.num_patches = embeddings.patch_embeddings.num_patches = new[1] * new[2]
        embeddings.patch_embeddings.image_size = (spec.height, spec.width)
        self.config.num_frames, self.config.image_size = spec.frames, spec.height

    def set_drop_path(self, rate: float) -> None:
        """For whole clips, and after the layer that ends the branch over time: there a dropped branch adds nothing.

        The official code drops single places and frames, and before that last layer, so that its bias stays.
        """
        for layer, own in zip(self.layers, drop_rates(rate, len(self.layers)), strict=True):
            frames = self.config.num_frames if self._divided else 1  # attention over space has a row for each frame
            layer.attention.output.dropout = after(layer.attention.output.dropout, DropPath(own, rows=frames))
            layer.output.dropout = after(layer.output.dropout, DropPath(own))
            if self._divided:
                layer.temporal_dense = DroppedLinear(layer.temporal_dense, DropPath(own))

    def logits(self, video: Tensor, keypoints: Tensor | None) -> Tensor:
        hidden_BND = self.timesformer.encoder(self._tokens(video, keypoints)).last_hidden_state
        return self.classifier(self.timesformer.layernorm(hidden_BND[:, 0]))

    def _tokens(self, video: Tensor, keypoints: Tensor | None) -> Tensor:
        """(B, 1 + P * T, D): the class token, then the tokens of each place, its times in a row, as transformers' layers want them."""
        embeddings = self.timesformer.embeddings
        patches_BTPD = self.projection(video, keypoints).unflatten(1, (self.config.num_frames, -1))
        places = embeddings.position_embeddings
        patches_BTPD = embeddings.time_drop(embeddings.pos_drop(patches_BTPD + places[:, None, 1:]) + embeddings.time_embeddings[:, :, None])
        first = embeddings.pos_drop(embeddings.cls_token + places[:, :1]).expand(len(video), -1, -1)
        return torch.cat([first, patches_BTPD.transpose(1, 2).flatten(1, 2)], dim=1)

    @property
    def _divided(self) -> bool:
        return bool(self.config.attention_type == "divided_space_time")


def pretrained(config: ModelConfig, class_names: Sequence[str], source: ClipSpec | None) -> TimeSformer:
    """ViT-B with divided attention, fine-tuned to Something-Something V2 (from BGR pixels)."""
    return from_checkpoint(TimeSformer, read_checkpoint(HUB_IDS["timesformer"]), config, class_names, source)


def tiny(config: ModelConfig, class_names: Sequence[str], source: ClipSpec | None) -> TimeSformer:
    """8 frames of 64 px, 0.8 M random weights, BGR as its family."""
    values = {**TINY, "model_type": "timesformer", "num_frames": 8}
    processor = {"channel_order": FAMILIES["timesformer"].channel_order}
    return from_checkpoint(TimeSformer, Checkpoint(RANDOM, Path(), values, None, processor, "its family"), config, class_names, source)
