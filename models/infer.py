"""The config of a state dict file that has no config.json beside it, from its key names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clips.errors import InputError

HEAD_WIDTH = 64  # of every published VideoMAE and TimeSformer
VIDEOMAE_FRAMES, VIDEOMAE_SIZE = 16, 224  # its positions are not among its weights


def infer_values(name: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json's values and the assumptions behind them, as lines."""
    model_type, prefix = _architecture(name, tensors)
    keys = {key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        values, notes = _common(name, model_type, keys)
        extra, extra_notes = _videomae(keys) if model_type == "videomae" else _timesformer(name, keys, values["patch_size"])
    except KeyError as error:
        raise InputError(f"{name}: holds no {error.args[0]}, from which its config could be read. Put its config.json beside it.") from error
    return {**values, **extra}, (*notes, *extra_notes)


def _architecture(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """model_type, and the prefix of the encoder's keys: empty for a bare encoder."""
    for model_type in ("videomae", "timesformer"):
        if any(key.startswith(f"{model_type}.") for key in tensors):
            return model_type, f"{model_type}."
    if "embeddings.patch_embeddings.projection.weight" in tensors:
        return ("timesformer" if "embeddings.cls_token" in tensors else "videomae"), ""
    found = ", ".join(list(tensors)[:3])
    raise InputError(f"{name}: expected transformers' key names (videomae.… or timesformer.…); found {found}, … Convert it, or give a transformers folder.")


def _common(name: str, model_type: str, keys: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], list[str]]:
    """What both architectures have."""
    hidden, channels, *_, patch, _ = keys["embeddings.patch_embeddings.projection.weight"]
    if hidden % HEAD_WIDTH:
        raise InputError(f"{name}: hidden size {hidden} is no multiple of {HEAD_WIDTH}, so its heads are unknown. Put its config.json beside it.")
    layers = {int(match[1]) for key in keys if (match := re.match(r"encoder\.layer\.(\d+)\.", key))}
    values = {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": 1 + max(layers, default=-1),
        "num_attention_heads": hidden // HEAD_WIDTH,
        "intermediate_size": keys["encoder.layer.0.intermediate.dense.weight"][0],
        "num_channels": channels,
        "patch_size": patch,
    }
    if "classifier.weight" in keys:  # nameless, but their number tells Something-Something V2 from others
        values["id2label"] = {str(k): f"LABEL_{k}" for k in range(keys["classifier.weight"][0])}
    return values, [f"no config.json beside it: read from shapes; assumed {hidden // HEAD_WIDTH} heads of {HEAD_WIDTH}"]


def _videomae(keys: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], list[str]]:
    biases = any(key.endswith((".q_bias", ".query.bias")) for key in keys)
    values = {
        "tubelet_size": keys["embeddings.patch_embeddings.projection.weight"][2],
        "qkv_bias": biases,
        "use_mean_pooling": "layernorm.weight" not in keys,
        "num_frames": VIDEOMAE_FRAMES,
        "image_size": VIDEOMAE_SIZE,
    }
    return values, [f"assumed {VIDEOMAE_FRAMES} frames of {VIDEOMAE_SIZE} px: VideoMAE's weights do not tell. Put a config.json beside the file if it differs"]


def _timesformer(name: str, keys: Mapping[str, tuple[int, ...]], patch: int) -> tuple[dict[str, Any], list[str]]:
    cells = keys["embeddings.position_embeddings"][1] - 1
    side = math.isqrt(cells)
    if side * side != cells:
        raise InputError(f"{name}: {cells} positions are no square, so its picture size is unknown. Put its config.json beside it.")
    divided = any(".temporal_attention." in key for key in keys)
    values = {
        "num_frames": keys["embeddings.time_embeddings"][1],
        "image_size": side * patch,
        "attention_type": "divided_space_time" if divided else "joint_space_time",
        "qkv_bias": "encoder.layer.0.attention.attention.qkv.bias" in keys,
    }
    return values, []
