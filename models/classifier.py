"""What every model of ours adds to its transformers class.

    uint8 (B, T, H, W, 3), joints (B, T, H, W) -> patches -> positions -> transformers' layers -> pooling -> classifier -> logits (B, K)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clips.clip import ClipSpec
from clips.errors import InputError

from .config import Sampling
from .folder import Origin, bias_of, model_card, write_folder
from .geometry import Patch
from .keys import HEAD, KEYPOINTS
from .patches import FoldedPatch
from .pixels import Pixels

SHAPING = (  # the values of a config.json that shape either architecture; drop path, decoders and generation do not, and some do not even load
    *("image_size", "patch_size", "num_channels", "num_frames", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps"),
)
LAYER = re.compile(r"\.encoder\.layer\.(\d+)\.")
Model = TypeVar("Model", bound="ClipClassifier")


class ClipClassifier(nn.Module):
    """A mixin before a transformers class whose patch embedding has become a FoldedPatch: uint8 (B, T, H, W, 3) -> logits (B, K)."""

    config: Any  # Any: a transformers config, of another class for each model
    plain_name: str  # the transformers class that reads our folders
    shaping: tuple[str, ...]  # the values of config.json that shape this architecture, besides SHAPING
    classifier: nn.Linear | nn.Identity  # as transformers declares it
    pixels: Pixels
    origin: Origin
    sampling: Sampling  # which frames of a snippet the model was fine-tuned on
    lines: tuple[str, ...]
    keypoints_dropout: float = 0.0
    frozen: bool = False
    checkpointed: bool = False  # whether activation checkpointing is on

    @classmethod
    def make_config(cls, values: Mapping[str, Any], trained_head: bool) -> Any:  # Any: as above
        """The transformers config of a checkpoint's values."""
        raise NotImplementedError

    def adapt(self, spec: ClipSpec) -> None:
        """Takes clips of another geometry from now on, with positions interpolated."""
        raise NotImplementedError

    def set_drop_path(self, rate: float) -> None:
        """Lets clips skip branches in training: the last layer's with this chance, the first layer's never."""
        raise NotImplementedError

    def logits(self, video: Tensor, keypoints: Tensor | None) -> Tensor:
        """Logits (B, K) of checked clips and of the joints that are shown."""
        raise NotImplementedError

    @property
    def projection(self) -> FoldedPatch:
        """The patch embedding."""
        raise NotImplementedError

    @property
    def layers(self) -> list[Any]:  # Any: transformers' layers, of another class for each model
        """The encoder's, first to last."""
        raise NotImplementedError

    @property
    def spec(self) -> ClipSpec:
        """The one geometry that the model takes."""
        height, width = pair(self.config.image_size)
        return ClipSpec(self.config.num_frames, height, width)

    @property
    def patch(self) -> Patch:
        """What one token covers."""
        return Patch(*self.projection.patch)

    @property
    def uses_keypoints(self) -> bool:
        """Whether the joints' mask is an input."""
        return self.projection.keypoint_weight is not None

    def forward(self, video: Tensor, keypoints: Tensor | None = None) -> Tensor:
        """Logits (B, K) of clips, uint8 (B, T, H, W, 3) RGB, and their joints' masks, 0/1 uint8 (B, T, H, W)."""
        self._check(video)
        return self.logits(video, self._shown(video, keypoints))

    def describe(self) -> list[str]:
        """Lines for the log: where the weights come from, the geometry, the pixels and why, the head."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        share = f", {trained / 1e6:.3g} M of them trained" if self.frozen else ""
        return [
            f"model: {type(self).__name__}, {parameters / 1e6:.1f} M parameters{share}",
            f"geometry: {self.spec} clips, patches of {self.config.patch_size} px",
            "channels-last: clips stay (B, T, H, W, C) bytes from the shard to the patch embedding, which normalises them",
            *self.lines,
            *self.cautions(),
        ]

    def cautions(self) -> list[str]:
        """Sentences on what plain transformers would get wrong in a saved folder."""
        if not self.uses_keypoints:
            return []
        return [f"{KEYPOINTS.split('.')[-1]}: plain transformers does not know the joints' channel and leaves it out, as if no joints were shown"]

    def save(self, folder: str | Path, class_names: Sequence[str], note: Mapping[str, Any] | None = None) -> None:
        """A transformers folder with config, weights, preprocessor_config and a model card that holds `note`."""
        if len(class_names) != self.config.num_labels:
            raise ValueError(f"{len(class_names)} class names for a head of {self.config.num_labels} classes")
        names = dict(enumerate(class_names))
        values = {
            **{name: getattr(self.config, name) for name in (*SHAPING, *self.shaping) if hasattr(self.config, name)},
            **{"model_type": self.config.model_type, "architectures": [self.plain_name], "dtype": str(self.dtype).removeprefix("torch.")},
            **{"id2label": {str(k): name for k, name in names.items()}, "label2id": {name: k for k, name in names.items()}},
            "qkv_bias": bias_of(vars(self.config)),
        }
        card = model_card(self.origin, self.plain_name, self.pixels, self.spec, class_names, note, self.cautions())
        write_folder(Path(folder), values, self.state_dict(), self.pixels, self.spec, card, self.sampling)

    def set_head_prior(self, class_counts: Sequence[int]) -> None:
        """Sets the head's bias to the log share of each class, so that a new head starts from the classes' own frequencies.

        A class without a clip counts as one clip.
        """
        if len(class_counts) != self.config.num_labels or min(class_counts) < 0:
            raise ValueError(f"class counts {list(class_counts)}, expected {self.config.num_labels} numbers of at least 0")
        counts = [max(count, 1) for count in class_counts]
        assert isinstance(self.classifier, nn.Linear)
        with torch.no_grad():
            self.classifier.bias.copy_(torch.tensor([math.log(count / sum(counts)) for count in counts]))

    def freeze(self) -> None:
        """Trains the head and the keypoints' channel alone; all else stays in evaluation mode, without dropout and drop path."""
        self.frozen = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD) or name.endswith(KEYPOINTS))
        self.train(self.training)

    def train(self: Model, mode: bool = True) -> Model:
        """Training mode, or evaluation mode; of a frozen model only the head."""
        super().train(mode and not self.frozen)
        if self.frozen:
            self.training = mode
            self.classifier.train(mode)
            for layer in self.layers if self.checkpointed and self.uses_keypoints else ():  # gradients pass them on their way to the channel
                layer.training = mode  # what transformers asks before it checkpoints; not what is in it: dropout and drop path stay off
        return self

    def checkpoint_activations(self, on: bool) -> None:
        """Keeps only each layer's input for the backward pass, or everything. Holds in training mode alone."""
        word = "activation" if hasattr(self, "activation_checkpointing_enable") else "gradient"  # its name in older versions of transformers
        if on:
            getattr(self, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
        else:
            getattr(self, f"{word}_checkpointing_disable")()
        self.checkpointed = on
        if self.frozen:
            self.train(self.training)

    @property
    def num_layers(self) -> int:
        """How many depths `layer_of` tells apart: embeddings, each layer, and what comes after them."""
        return int(self.config.num_hidden_layers) + 2

    def layer_of(self, parameter_name: str) -> int:
        """The depth of a parameter for learning rates that decay towards the input: 0 embeddings, i + 1 layer i, num_layers - 1 the rest.

        The keypoints' channel is new, so it counts among the rest.
        """
        if match := LAYER.search(parameter_name):
            return int(match[1]) + 1
        return 0 if ".embeddings." in parameter_name and not parameter_name.endswith(KEYPOINTS) else self.num_layers - 1

    def _shown(self, video: Tensor, keypoints: Tensor | None) -> Tensor | None:
        """The joints' masks that reach the model; in training some clips' are hidden, and none at all are zeros, so that the channel has a gradient."""
        if keypoints is not None and (not self.uses_keypoints or keypoints.dtype != torch.uint8 or keypoints.shape != video.shape[:-1]):
            expected = f"uint8 {tuple(video.shape[:-1])} of 0 and 1" if self.uses_keypoints else "none, the model was built without --use-keypoints channel"
            raise TypeError(f"keypoints: expected {expected}; found {keypoints.dtype} {tuple(keypoints.shape)}")
        if not self.uses_keypoints or not self.training:
            return keypoints
        if keypoints is None:
            return video.new_zeros(video.shape[:-1])
        shown = torch.rand(len(video), device=video.device) >= self.keypoints_dropout
        return keypoints * shown[:, None, None, None]

    def _check(self, video: Tensor) -> None:
        spec = self.spec
        if video.dtype == torch.uint8 and video.ndim == 5 and tuple(video.shape[1:]) == spec.video_shape:
            return
        expected = f"uint8 (B, {', '.join(map(str, spec.video_shape))}) RGB"
        if video.dtype != torch.uint8:
            raise TypeError(f"video: expected {expected}, found {video.dtype}; the model normalises by itself, give it bytes")
        raise InputError(f"video: expected {expected}, the model's own geometry; found {tuple(video.shape)}. Sample and resize clips to {spec}.")


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a config's number or pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
