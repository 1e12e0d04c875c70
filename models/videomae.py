"""VideoMAE: tubelets of two frames, joint space-time attention, the mean of all tokens; no class token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from clips.clip import ClipSpec

from .attention import SeparateAttention
from .build import TINY, from_checkpoint
from .checkpoints import Checkpoint, read_checkpoint
from .classifier import ClipClassifier, pair
from .config import ModelConfig
from .drop_path import DropPath, after, drop_rates
from .folder import RANDOM
from .geometry import Grid
from .hub import HUB_IDS
from .patches import FoldedPatch
from .pixels import Pixels
from .positions import resize_grid, sincos_table


class VideoMAE(ClipClassifier, VideoMAEForVideoClassification):
    """transformers' VideoMAE with its keys and shapes, fed with uint8 clips."""

    plain_name = "VideoMAEForVideoClassification"
    shaping = ("tubelet_size", "use_mean_pooling", "position_grid")

    def __init__(self, config: VideoMAEConfig, pixels: Pixels) -> None:
        # Only the embeddings know the geometry, and their table is replaced below: built for one token, transformers need not loop
        # over a table of positions (3 s of 16 x 224 in numpy).
        geometry = config.image_size, config.num_frames
        config.image_size, config.num_frames = pair(config.patch_size), config.tubelet_size
        super().__init__(config)
        config.image_size, config.num_frames = geometry
        embeddings: Any = self.videomae.embeddings  # Any: its projection becomes another class
        embeddings.patch_embeddings.projection = FoldedPatch(embeddings.patch_embeddings.projection, pixels)
        # transformers keeps the table on the CPU and copies it to the device in every forward (4.8 MB at 16 x 224); not in the state dict there, nor here.
        del embeddings.position_embeddings
        embeddings.register_buffer("position_embeddings", self._table(), persistent=False)
        for layer in self.layers:
            layer.attention.attention = SeparateAttention(layer.attention.attention, config.num_attention_heads, config.attention_probs_dropout_prob)

    @classmethod
    def make_config(cls, values: Mapping[str, Any], trained_head: bool) -> VideoMAEConfig:
        """A checkpoint without a head gets mean pooling, as its authors fine-tune it: it has no class token to read."""
        values = dict(values)
        bias = values.pop("qkv_bias")
        values["qv_bias" if hasattr(VideoMAEConfig, "qv_bias") else "qkv_bias"] = bias
        if not trained_head:
            values["use_mean_pooling"] = True
        base = values.get("position_grid", [1, 1, 1])
        if not (isinstance(base, list | tuple) and len(base) == 3 and all(isinstance(side, int) and side > 0 for side in base)):
            raise ValueError(f"position_grid {base!r}, expected the tokens over time, down and across that the positions are interpolated from")
        return VideoMAEConfig(**values)

    @property
    def projection(self) -> FoldedPatch:
        projection: Any = self.videomae.embeddings.patch_embeddings.projection  # Any: transformers declares a convolution
        return projection

    @property
    def layers(self) -> list[Any]:
        return list(self.videomae.encoder.layer)

    @property
    def position_grid(self) -> Grid:
        """The grid of tokens that the checkpoint was pretrained on: every adaptation starts from its table."""
        frames, height, width = getattr(self.config, "position_grid", None) or self.patch.grid(self.spec)
        return frames, height, width

    def adapt(self, spec: ClipSpec) -> None:
        """The table of the pretrained grid, interpolated. It is no parameter, so config.json remembers the grid."""
        base = self.position_grid
        self.config.num_frames = spec.frames
        self.config.image_size = spec.height if spec.height == spec.width else [spec.height, spec.width]
        if base == self.patch.grid(spec):
            vars(self.config).pop("position_grid", None)
        else:
            self.config.position_grid = list(base)
        self.videomae.embeddings.position_embeddings = self._table()

    def set_drop_path(self, rate: float) -> None:
        for layer, own in zip(self.layers, drop_rates(rate, len(self.layers)), strict=True):
            for branch in (layer.attention.output, layer.output):
                branch.dropout = after(branch.dropout, DropPath(own))

    def logits(self, video: Tensor, keypoints: Tensor | None) -> Tensor:
        tokens_BND = self.projection(video, keypoints)
        tokens_BND = tokens_BND + self.videomae.embeddings.position_embeddings.to(tokens_BND.dtype)
        hidden_BND = self.videomae.encoder(tokens_BND).last_hidden_state
        last_norm: Any = self.videomae.layernorm  # Any: None where fc_norm is not
        pooled_BD = last_norm(hidden_BND[:, 0]) if self.fc_norm is None else self.fc_norm(hidden_BND.mean(1))
        return self.classifier(pooled_BD)

    def cautions(self) -> list[str]:
        adapted = self.position_grid != self.patch.grid(self.spec)
        wrong = "plain transformers makes the table of positions anew and so misplaces this model's tokens without a word: load it with this project"
        return [*super().cautions(), *([f"positions: interpolated from a grid of {'x'.join(map(str, self.position_grid))} tokens; {wrong}"] if adapted else [])]

    def _table(self) -> Tensor:
        base = self.position_grid
        frames, height, width = base
        return resize_grid(sincos_table(frames * height * width, self.config.hidden_size), base, self.patch.grid(self.spec)).to(self.device)


def pretrained(config: ModelConfig, class_names: Sequence[str], source: ClipSpec | None) -> VideoMAE:
    """ViT-B, pretrained on and fine-tuned to Something-Something V2."""
    return from_checkpoint(VideoMAE, read_checkpoint(HUB_IDS["videomae"]), config, class_names, source)


def tiny(config: ModelConfig, class_names: Sequence[str], source: ClipSpec | None) -> VideoMAE:
    """16 frames of 64 px, 0.6 M random weights: learns made-up clips in about a minute on two cores."""
    values = {**TINY, "model_type": "videomae", "num_frames": 16}
    return from_checkpoint(VideoMAE, Checkpoint(RANDOM, Path(), values, None), config, class_names, source)
