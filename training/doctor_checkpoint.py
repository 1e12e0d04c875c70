"""The weights that a run starts from, found without loading them and without a network."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub.constants

from models import MODELS
from models.hub import HUB_IDS, WEIGHTS, cached, is_hub_id

from .room import FLOAT32_BYTES

# Measured by counting those of the built models with two classes.
PARAMETERS = {"videomae": 86_230_000, "timesformer": 121_260_000, "videomae-tiny": 595_000, "timesformer-tiny": 711_000}


@dataclass(frozen=True)
class Weights:
    """`state`: made here of random numbers, found on this machine's disks, only on the hub, or nowhere."""

    name: str
    state: Literal["random", "here", "hub", "nowhere"]
    parameters: int | None  # about


def find_weights(name: str) -> Weights:
    """What --model-name names."""
    if name in MODELS and name not in HUB_IDS:
        return Weights(name, "random", PARAMETERS.get(name))
    hub_id, path = HUB_IDS.get(name, name), Path(name).expanduser()
    if name not in HUB_IDS and path.exists():
        return Weights(name, "here", count_parameters(path))
    if not is_hub_id(hub_id):
        return Weights(name, "nowhere", None)
    folder = cached(hub_id)
    count = PARAMETERS.get(name) or (count_parameters(folder) if folder else None)
    return Weights(name, "here" if folder else "hub", count)


def count_parameters(path: Path) -> int | None:
    """Of a checkpoint's folder or file: what safetensors' header says, else a quarter of the file's bytes; None without weights."""
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), None) if path.is_dir() else path
    if file is None or not file.is_file():
        return None
    if file.suffix != ".safetensors":
        return file.stat().st_size // FLOAT32_BYTES
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        return None  # damaged: training says so


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE keeps the hub's client from the network."""
    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)
