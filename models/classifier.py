"""What every model of ours adds to its transformers class, and the one way from a checkpoint to a model.

Checkpoint -> config -> module with fresh, seeded weights -> keys.fit -> load, all or nothing -> model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from clips.clip import ClipSpec
from clips.errors import InputError

from .checkpoints import Checkpoint
from .config import ModelConfig
from .folder import RANDOM, UNKNOWN_LICENCE, Origin, bias_of, model_card, write_folder
from .keys import HEAD, KEY_BIAS, fit, has_head
from .pixels import Pixels, choose_pixels, known

SEED = 0  # of new heads and of the tiny models: every run starts from the same numbers
HEAD_STD = 0.02
SHAPING = (  # the values of a config.json that shape either architecture; drop path, decoders and generation do not, and some do not even load
    *("image_size", "patch_size", "num_channels", "num_frames", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps"),
)
TINY = {"image_size": 64, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384}
Model = TypeVar("Model", bound="ClipClassifier")


class ClipClassifier(nn.Module):
    """A mixin before a transformers class whose patch embedding has become a FoldedPatch: uint8 (B, T, H, W, 3) -> logits (B, K)."""

    config: Any  # Any: a transformers config, of another class for each model
    plain_name: str  # the transformers class that reads our folders
    shaping: tuple[str, ...]  # the values of config.json that shape this architecture, besides SHAPING
    classifier: nn.Linear | nn.Identity  # as transformers declares it
    pixels: Pixels
    origin: Origin
    lines: tuple[str, ...]

    @classmethod
    def make_config(cls, values: Mapping[str, Any], trained_head: bool) -> Any:  # Any: as above
        """The transformers config of a checkpoint's values."""
        raise NotImplementedError

    @property
    def spec(self) -> ClipSpec:
        """The one geometry that the model takes: its checkpoint's own."""
        height, width = pair(self.config.image_size)
        return ClipSpec(self.config.num_frames, height, width)

    def forward(self, video: Tensor) -> Tensor:
        """Logits (B, K) of clips, uint8 (B, T, H, W, 3) RGB."""
        self._check(video)
        return super().forward(video, return_dict=True).logits

    def describe(self) -> list[str]:
        """Lines for the log: where the weights come from, the geometry, the pixels and why, the head."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return [
            f"model: {type(self).__name__}, {parameters / 1e6:.1f} M parameters",
            f"geometry: {self.spec} clips, patches of {self.config.patch_size} px",
            *self.lines,
        ]

    def save(self, folder: str | Path, class_names: Sequence[str], note: Mapping[str, Any] | None = None) -> None:
        """A transformers folder with config, weights, preprocessor_config and a model card that holds `note`."""
        if len(class_names) != self.config.num_labels:
            raise ValueError(f"{len(class_names)} class names for a head of {self.config.num_labels} classes")
        names = dict(enumerate(class_names))
        values = {
            **{name: getattr(self.config, name) for name in (*SHAPING, *self.shaping)},
            **{"model_type": self.config.model_type, "architectures": [self.plain_name], "dtype": str(self.dtype).removeprefix("torch.")},
            **{"id2label": {str(k): name for k, name in names.items()}, "label2id": {name: k for k, name in names.items()}},
            "qkv_bias": bias_of(vars(self.config)),
        }
        card = model_card(self.origin, self.plain_name, self.pixels, self.spec, class_names, note)
        write_folder(Path(folder), values, self.state_dict(), self.pixels, self.spec, card)

    def _check(self, video: Tensor) -> None:
        expected = f"uint8 (B, {', '.join(map(str, self.spec.video_shape))}) RGB"
        if video.dtype != torch.uint8:
            raise TypeError(f"video: expected {expected}, found {video.dtype}; the model normalises by itself, give it bytes")
        if video.ndim != 5 or tuple(video.shape[1:]) != self.spec.video_shape:
            raise InputError(f"video: expected {expected}, the checkpoint's own geometry; found {tuple(video.shape)}. Sample and resize clips to {self.spec}.")


def from_checkpoint(family: type[Model], checkpoint: Checkpoint, config: ModelConfig, class_names: Sequence[str], keep_head: bool = False) -> Model:
    """The checkpoint in a model of its own geometry; the head is new, normal 0.02 and zero bias, unless it is kept."""
    tensors, values = checkpoint.tensors, checkpoint.values
    _check_names(class_names)
    pixels, pixel_line = choose_pixels(config, values, checkpoint.processor, checkpoint.processor_name, checkpoint.hub_id)
    model = _fresh(family, checkpoint, class_names, pixels)
    notes: tuple[str, ...] = ()
    if tensors is not None:
        fitted = fit(checkpoint.name, tensors, model.state_dict(), str(model.config.model_type), keep_head)
        model.load_state_dict({**model.state_dict(), **fitted.tensors})
        notes = fitted.notes
    for name, parameter in model.named_parameters():
        if name.endswith(KEY_BIAS):  # in 5.17 alone; its gradient is rounding noise, which AdamW would blow up to full steps
            parameter.requires_grad_(False)
    head = "kept" if keep_head else "new"
    model.origin = _origin(checkpoint)
    start = f"start weights: {model.origin.name}, licence {model.origin.licence}"
    weights = (start,) if checkpoint.name == model.origin.name else (f"weights: {checkpoint.name}", start)
    model.lines = (*weights, pixel_line, f"head: {head}, {len(class_names)} classes: {', '.join(class_names)}", *checkpoint.notes, *notes)
    return model


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a config's number or pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _fresh(family: type[Model], checkpoint: Checkpoint, class_names: Sequence[str], pixels: Pixels) -> Model:
    """The model with every number from SEED, the same in all versions of transformers: matrices and tables normal 0.02, norms one, biases zero."""
    shaping = {name: value for name, value in checkpoint.values.items() if name in (*SHAPING, *family.shaping)}
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: k for k, name in enumerate(class_names)}}
    shaping |= {**labels, "qkv_bias": bias_of(checkpoint.values)}
    try:
        hf_config = family.make_config(shaping, has_head(checkpoint.tensors or ("classifier.weight",)))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint.name}: config.json does not describe a {family.__name__} ({' '.join(str(error).split())}).") from error
    _check_geometry(checkpoint.name, hf_config)
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator; what it draws is replaced
        model = family(hf_config, pixels)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        if checkpoint.tensors is not None and not name.startswith(HEAD):
            continue
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=HEAD_STD, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    model.pixels = pixels
    return model


def _origin(checkpoint: Checkpoint) -> Origin:
    """A saved folder names the start weights that it came from; its licence is theirs."""
    entry = known(checkpoint.hub_id)
    licence = (entry.licence if entry else None) or checkpoint.card.get("license")
    name = checkpoint.hub_id or checkpoint.card.get("base_model") or checkpoint.name
    return Origin(name, "none" if name == RANDOM else licence or UNKNOWN_LICENCE)


def _check_names(class_names: Sequence[str]) -> None:
    if not class_names or len(set(class_names)) != len(class_names):
        raise InputError(f"classes {', '.join(class_names) or '(none)'}: expected at least one, each once.")


def _check_geometry(name: str, config: Any) -> None:  # Any: a transformers config
    """Raises where transformers would cut frames or pixels off in silence."""
    (height, width), (patch_height, patch_width) = pair(config.image_size), pair(config.patch_size)
    tubelet = getattr(config, "tubelet_size", 1)
    if config.num_channels != 3:
        raise InputError(f"{name}: config.json says {config.num_channels} channels; expected 3.")
    if height % patch_height or width % patch_width or config.num_frames % tubelet:
        patch = f"{tubelet}x{patch_height}x{patch_width}"
        raise InputError(f"{name}: {config.num_frames} frames of {height}x{width} do not divide into patches of {patch}. Check config.json.")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(f"{name}: hidden size {config.hidden_size} does not divide into {config.num_attention_heads} heads. Check config.json.")
