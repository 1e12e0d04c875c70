"""A transformers folder, written so that plain transformers of every version reads it back exactly.

config.json  preprocessor_config.json  README.md  model.safetensors
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import transformers
from safetensors.torch import save_file
from torch import Tensor

from clips.clip import ClipSpec
from clips.errors import InputError

from .config import Sampling
from .keys import KEY_BIAS, SPELLINGS
from .pixels import Pixels

UNKNOWN_LICENCE = "see the start checkpoint"
SAMPLING = "frame_sampling"  # ours, in preprocessor_config.json
RANDOM = "random"  # the start weights of the tiny models


@dataclass(frozen=True)
class Origin:
    """Where a model's start weights come from."""

    name: str  # a hub id, a path, or RANDOM
    licence: str


def write_folder(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], pixels: Pixels, spec: ClipSpec, card: str, sampling: Sampling) -> None:
    """Writes or renews the four files, each one complete or absent, the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "config.json", lambda file: file.write_text(_json(versions_agree(values)), "utf-8"))
    _replace(folder / "preprocessor_config.json", lambda file: file.write_text(_json(processor(pixels, spec, sampling)), "utf-8"))
    _replace(folder / "README.md", lambda file: file.write_text(card, "utf-8"))
    plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in plain_keys(tensors).items()}
    _replace(folder / "model.safetensors", lambda file: save_file(plain, file, metadata={"format": "pt"}))


def plain_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query and value biases in the spelling that all versions read, and no key bias that is zero, so that 5.17 writes what 5.23 writes."""
    old_to_new = dict(SPELLINGS)
    result = {}
    for key, tensor in tensors.items():
        old = next((old for old in old_to_new if key.endswith(old)), None)
        if key.endswith(KEY_BIAS) and not bool(tensor.any()):
            continue
        result[key if old is None else key.removesuffix(old) + old_to_new[old]] = tensor
    return result


def versions_agree(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's values with VideoMAE's bias flag under the names of 5.17 (qkv_bias) and of later versions (qv_bias).

    TimeSformer's drop_path_rate is an integer to transformers, which does not load a config that says 0.1.
    """
    values = {name: value for name, value in values.items() if name != "drop_path_rate"}
    if values["model_type"] == "videomae":
        values["qkv_bias"] = values["qv_bias"] = bias_of(values)
    return {**values, "transformers_version": transformers.__version__}


def bias_of(values: Mapping[str, Any]) -> bool:
    """Whether query and value have biases, under either name; both architectures have them unless said otherwise."""
    return bool(values.get("qv_bias", values.get("qkv_bias", True)))


def processor(pixels: Pixels, spec: ClipSpec, sampling: Sampling) -> dict[str, Any]:
    """preprocessor_config.json: what transformers' processors read, and what they do not know, channel order and which frames."""
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"height": spec.height, "width": spec.width},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "channel_order": pixels.channel_order,
        SAMPLING: sampling,
    }


def sampling_of(processor: Mapping[str, Any], name: str) -> Sampling:
    """Which frames of a snippet the checkpoint was fine-tuned on, as far as a folder of ours says it; uniform otherwise, as both SSv2 recipes."""
    found = processor.get(SAMPLING, "uniform")
    if found not in get_args(Sampling):
        raise InputError(f"{name}: {SAMPLING} is {found!r}; expected one of {', '.join(get_args(Sampling))}. Give --sampling.")
    return found


def model_card(
    origin: Origin,
    architecture: str,
    pixels: Pixels,
    spec: ClipSpec,
    class_names: Sequence[str],
    note: Mapping[str, Any] | None,
    cautions: Sequence[str] = (),
) -> str:
    """README.md: licence, start weights, classes, what the model eats, how to load it, what plain transformers gets wrong, what the caller notes."""
    front = ["library_name: transformers", "pipeline_tag: video-classification"]
    if origin.name != RANDOM and origin.licence != UNKNOWN_LICENCE:
        front = [f"license: {origin.licence.lower()}", *front]
    shape = f"(B, {spec.frames}, 3, {spec.height}, {spec.width})"
    lines = [
        *("---", *front, f"base_model: {origin.name}", "---", f"# {architecture} for {', '.join(class_names)}", ""),
        f"Start weights: {origin.name}. Licence of the start weights: {origin.licence}; it holds for this model, too.",
        "",
        f"Classes in label order: {', '.join(f'{k} {name}' for k, name in enumerate(class_names))}.",
        "",
        f"Input of plain transformers: float {shape} in {pixels.channel_order.upper()} order, (pixels / 255 - mean) / std with mean {list(pixels.mean)} and",
        f"std {list(pixels.std)}, whole frames resized to {spec.height} x {spec.width}. transformers' processors do not turn RGB into BGR.",
        "",
        *("```python", f"from transformers import {architecture}", f'model = {architecture}.from_pretrained(".")', "```", ""),
    ]
    lines += ["## Beware", "", *(f"- {caution}" for caution in cautions), ""] if cautions else []
    lines += ["## Notes", "", *(f"- {key}: {value}" for key, value in note.items()), ""] if note else []
    return "\n".join(lines)


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the file, syncs, and renames: a folder in use never holds half a file."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's; safetensors writes a file of its own, for its owner alone
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
