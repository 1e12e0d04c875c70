"""Which model, and what it should be told about its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clips.errors import InputError

Triple = tuple[float, float, float]
ChannelOrder = Literal["rgb", "bgr"]


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from; what the flags leave out is read beside the checkpoint."""

    model_name: str
    """videomae, timesformer, videomae-tiny or timesformer-tiny; or a checkpoint of these two: a local folder, a state dict file, or owner/name on the hub."""

    mean: Triple | None = None
    """Pixel means of the checkpoint, 0 to 1, in its own channel order; overrides its preprocessor_config.json."""

    std: Triple | None = None
    """Pixel standard deviations of the checkpoint, 0 to 1, in its own channel order; overrides its preprocessor_config.json."""

    channel_order: ChannelOrder | None = None
    """The channel order that the checkpoint was trained on; our clips are RGB and are turned inside the model."""

    def __post_init__(self) -> None:
        if not self.model_name.strip():
            raise InputError("--model-name: empty; expected a model's name, a local checkpoint or owner/name.")
        if self.mean is not None and not all(0 <= value <= 1 for value in self.mean):
            raise InputError(f"--mean {self.mean}: expected three numbers from 0 to 1. Divide means of bytes by 255.")
        if self.std is not None and not all(0 < value <= 1 for value in self.std):
            raise InputError(f"--std {self.std}: expected three numbers above 0, at most 1. Divide deviations of bytes by 255.")
        if self.channel_order not in (None, "rgb", "bgr"):
            raise InputError(f"--channel-order {self.channel_order}: expected rgb or bgr.")
