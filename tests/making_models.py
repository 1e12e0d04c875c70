"""Checkpoints made for tests: the real architectures and key names, small, with every tensor random, in each spelling that exists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TimesformerConfig, TimesformerForVideoClassification, VideoMAEConfig, VideoMAEForVideoClassification

torch.set_num_threads(1)  # on busy cores OpenMP's threads wait for each other: models this small are 20 times slower with two (measured)

FAMILIES = ("videomae", "timesformer")
SPELLINGS = ("hub", "5.17", "5.23", "in memory")
CLASSES = ("nongesture", "gesture")
SMALL: dict[str, Any] = {"image_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
NUM_FRAMES = 4
# Different for each channel, so that a turned channel order shows.
PROCESSOR: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_rescale": True, "do_normalize": True}


def plain_model(family: str, num_labels: int = 174, seed: int = 0, **changes: Any) -> PreTrainedModel:  # Any: values of a config
    """transformers' own model, in evaluation mode, with every parameter drawn, biases too."""
    values = {**SMALL, "num_frames": NUM_FRAMES, "num_labels": num_labels, **changes}
    makers = {
        "videomae": lambda: VideoMAEForVideoClassification(VideoMAEConfig(**values)),
        "timesformer": lambda: TimesformerForVideoClassification(TimesformerConfig(**values)),
    }
    model = makers[family]()
    draw(model, seed)
    return model.eval()


def draw(model: nn.Module, seed: int) -> None:
    """Fills every parameter: norms around one, the rest around zero, large enough that each one moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))


def spelled(tensors: Mapping[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """A state dict as that version writes it; 5.17 adds key biases, the others have none."""
    attention = ".attention.attention."
    result = {}
    for key, tensor in tensors.items():
        if key.endswith(f"{attention}key.bias"):
            continue
        if spelling in ("hub", "5.23"):
            key = key.replace(f"{attention}query.bias", f"{attention}q_bias").replace(f"{attention}value.bias", f"{attention}v_bias")
        result[key] = tensor.clone()
        if spelling == "5.17" and key.endswith(f"{attention}query.bias"):
            result[key.replace("query", "key")] = torch.linspace(-1, 1, len(tensor))
    return result


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    spelling: str = "hub",
    weights: str = "pytorch_model.bin",
    processor: Mapping[str, Any] | None = PROCESSOR,
    **values: Any,  # Any: as above
) -> Path:
    """A folder as found on the hub or as that version of transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**json.loads(model.config.to_json_string()), **values}
    if config["model_type"] == "videomae":
        bias = config.pop("qv_bias", config.pop("qkv_bias", True))
        config["qv_bias" if spelling == "5.23" else "qkv_bias"] = bias
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tensors = spelled(model.state_dict(), spelling)
    if weights.endswith(".safetensors"):
        save_file(tensors, folder / weights)
    else:
        torch.save(tensors, folder / weights)
    return folder


def clips(num: int = 2, frames: int = NUM_FRAMES, size: int = 32, seed: int = 7) -> Tensor:
    """uint8 (B, T, H, W, 3)."""
    return torch.randint(0, 256, (num, frames, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalised(video: Tensor, mean: Sequence[float], std: Sequence[float], order: str = "rgb") -> Tensor:
    """What plain transformers wants: float (B, T, 3, H, W) in the checkpoint's channel order; mean and std are in that order, too."""
    pixels = video.flip(-1) if order == "bgr" else video
    return ((pixels.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 1, 4, 2, 3).float()


def plain_logits(model: nn.Module, video: Tensor, order: str = "rgb") -> Tensor:
    """Logits of plain transformers on clips normalised as PROCESSOR says."""
    with torch.no_grad():
        return model(normalised(video, PROCESSOR["image_mean"], PROCESSOR["image_std"], order)).logits


def edit(folder: Path, **values: Any) -> None:  # Any: as above
    """Changes values of a written config.json, or with None removes them."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def save_tensors(folder: Path, change: dict[str, Tensor | None], file: str = "pytorch_model.bin") -> None:
    """Replaces, adds, or with None removes tensors of a written checkpoint."""
    tensors = torch.load(folder / file, weights_only=True) | change
    torch.save({key: value for key, value in tensors.items() if value is not None}, folder / file)
