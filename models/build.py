"""The one way from a checkpoint to a model.

Checkpoint -> config -> module with fresh, seeded weights -> keys.fit -> load, all or nothing -> adapt to the geometry -> model
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from clips.clip import ClipSpec
from clips.errors import InputError

from .checkpoints import Checkpoint
from .classifier import SHAPING, Model, pair
from .config import ModelConfig
from .folder import RANDOM, UNKNOWN_LICENCE, Origin, bias_of, sampling_of
from .geometry import explain_geometry, resolve_geometry
from .keys import HEAD, KEY_BIAS, KEYPOINTS, fit, has_head
from .pixels import Pixels, choose_pixels, known

SEED = 0  # of new heads and of the tiny models: every run starts from the same numbers
HEAD_STD = 0.02
COMPILES_FROM = (2, 11)  # torch
TINY = {"image_size": 64, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384}


def from_checkpoint(
    family: type[Model],
    checkpoint: Checkpoint,
    config: ModelConfig,
    class_names: Sequence[str],
    source: ClipSpec | None = None,
    keep_head: bool = False,
) -> Model:
    """The checkpoint in a model of the geometry that is asked for; the head is new, small and without bias, unless it is kept."""
    _check_names(class_names)
    pixels, pixel_line = choose_pixels(config, checkpoint.values, checkpoint.processor, checkpoint.processor_name, checkpoint.hub_id)
    model = _fresh(family, checkpoint, class_names, pixels)
    own = model.spec
    spec = resolve_geometry(config, own, source, model.patch)
    _add_keypoints(model, checkpoint, config, keep_head)
    notes: tuple[str, ...] = ()
    if checkpoint.tensors is not None:
        fitted = fit(checkpoint.name, checkpoint.tensors, model.state_dict(), str(model.config.model_type), keep_head)
        model.load_state_dict({**model.state_dict(), **fitted.tensors})
        notes = fitted.notes
    model.adapt(spec)
    if not keep_head:
        assert isinstance(model.classifier, nn.Linear)
        model.classifier.weight.data.mul_(config.head_init_scale)
    model.origin = _origin(checkpoint)
    model.sampling = config.sampling or sampling_of(checkpoint.processor, checkpoint.processor_name)
    start = f"start weights: {model.origin.name}, licence {model.origin.licence}"
    weights = (start,) if checkpoint.name == model.origin.name else (f"weights: {checkpoint.name}", start)
    head = f"head: {'kept' if keep_head else 'new'}, {len(class_names)} classes: {', '.join(class_names)}"
    model.lines = (*weights, *explain_geometry(spec, own, source), pixel_line, head, *_explain_training(model, config), *checkpoint.notes, *notes)
    _prepare_training(model, config)
    return model


def _prepare_training(model: Model, config: ModelConfig) -> None:
    """Which parameters learn, and what is done by chance."""
    for name, parameter in model.named_parameters():
        if name.endswith(KEY_BIAS):  # in 5.17 alone; its gradient is rounding noise, which AdamW would blow up to full steps
            parameter.requires_grad_(False)
    if config.drop_path > 0:
        model.set_drop_path(config.drop_path)
    if config.freeze:
        model.freeze()
    if config.activation_checkpointing == "on":
        model.checkpoint_activations(True)
    if config.compile:
        check_torch(torch.__version__)
        model.compile(dynamic=False)  # in place: the keys keep their names


def check_torch(version: str) -> None:
    """Raises InputError for a torch that cannot compile our models: 2.6 fails inside its own compiler, 2.11 and 2.13 make one graph of each."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < COMPILES_FROM:
        raise InputError(f"--compile: needs torch {'.'.join(map(str, COMPILES_FROM))} or newer, found {version}. Leave it out, or take a newer torch.")


def _explain_training(model: Model, config: ModelConfig) -> list[str]:
    """Lines on what differs from plain fine-tuning."""
    lines = []
    if model.uses_keypoints:
        lines.append(f"keypoints: a fourth input channel; hidden in {100 * config.keypoints_dropout:g} % of the training clips")
    if config.drop_path > 0:
        lines.append(f"drop path: 0 at the first layer, {config.drop_path:g} at the last")
    if config.freeze:
        lines.append("frozen: all but the head" + (" and the keypoints' channel" if model.uses_keypoints else ""))
    return lines


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


def _add_keypoints(model: Model, checkpoint: Checkpoint, config: ModelConfig, keep_head: bool) -> None:
    """The fourth channel, where it is asked for, or where a trained model has it."""
    trained = keep_head and any(key.endswith(KEYPOINTS) for key in checkpoint.tensors or ())
    if config.use_keypoints == "channel" or trained:
        model.projection.add_keypoints()
        model.keypoints_dropout = config.keypoints_dropout


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
