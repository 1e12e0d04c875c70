"""VideoMAE: tubelets of two frames, joint space-time attention, the mean of all tokens; no class token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from .checkpoints import Checkpoint, read_checkpoint
from .classifier import TINY, ClipClassifier, from_checkpoint, pair
from .config import ModelConfig
from .folder import RANDOM
from .hub import HUB_IDS
from .patches import FoldedPatch
from .pixels import Pixels
from .positions import sincos_table


class VideoMAE(ClipClassifier, VideoMAEForVideoClassification):
    """transformers' VideoMAE with its keys and shapes, fed with uint8 clips."""

    plain_name = "VideoMAEForVideoClassification"
    shaping = ("tubelet_size", "use_mean_pooling")

    def __init__(self, config: VideoMAEConfig, pixels: Pixels) -> None:
        # Only the embeddings know the geometry, and they are replaced below: built for one token, transformers need not loop
        # over a table of positions (3 s of 16 x 224 in numpy).
        geometry = config.image_size, config.num_frames
        config.image_size, config.num_frames = pair(config.patch_size), config.tubelet_size
        super().__init__(config)
        config.image_size, config.num_frames = geometry
        self.videomae.add_module("embeddings", TubeletEmbeddings(config, self.videomae.embeddings.patch_embeddings.projection, pixels))

    @classmethod
    def make_config(cls, values: Mapping[str, Any], trained_head: bool) -> VideoMAEConfig:
        """A checkpoint without a head gets mean pooling, as its authors fine-tune it: it has no class token to read."""
        values = dict(values)
        bias = values.pop("qkv_bias")
        values["qv_bias" if hasattr(VideoMAEConfig, "qv_bias") else "qkv_bias"] = bias
        if not trained_head:
            values["use_mean_pooling"] = True
        return VideoMAEConfig(**values)


class TubeletEmbeddings(nn.Module):
    """uint8 clips to tokens with their positions, (B, N, D)."""

    position_embeddings: Tensor

    def __init__(self, config: VideoMAEConfig, conv: nn.Conv3d, pixels: Pixels) -> None:
        super().__init__()
        (height, width), (patch_height, patch_width) = pair(config.image_size), pair(config.patch_size)
        self.num_patches = (config.num_frames // config.tubelet_size) * (height // patch_height) * (width // patch_width)
        self.patch_embeddings = nn.ModuleDict({"projection": FoldedPatch(conv, pixels)})
        # transformers keeps the table on the CPU and copies it to the device in every forward (4.8 MB at 16 x 224); not in the state dict there, nor here.
        self.register_buffer("position_embeddings", sincos_table(self.num_patches, config.hidden_size), persistent=False)

    def forward(self, video: Tensor, bool_masked_pos: None = None) -> Tensor:
        """The second argument is what transformers hands over, always None in a classifier."""
        tokens = self.patch_embeddings["projection"](video)
        return tokens + self.position_embeddings.to(tokens.dtype)


def pretrained(config: ModelConfig, class_names: Sequence[str]) -> VideoMAE:
    """ViT-B, pretrained on and fine-tuned to Something-Something V2."""
    return from_checkpoint(VideoMAE, read_checkpoint(HUB_IDS["videomae"]), config, class_names)


def tiny(config: ModelConfig, class_names: Sequence[str]) -> VideoMAE:
    """16 frames of 64 px, 0.6 M random weights: learns made-up clips in about a minute on two cores."""
    values = {**TINY, "model_type": "videomae", "num_frames": 16}
    return from_checkpoint(VideoMAE, Checkpoint(RANDOM, Path(), values, None), config, class_names)
