"""Which model, what it should be told about its checkpoint, and how it is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clips.errors import InputError

Triple = tuple[float, float, float]
ChannelOrder = Literal["rgb", "bgr"]
Sampling = Literal["uniform", "dense", "centre"]


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from; what the flags leave out is read beside the checkpoint."""

    model_name: str
    """videomae, timesformer, videomae-tiny or timesformer-tiny; or a checkpoint of these two: a local folder, a state dict file, or owner/name on the hub."""

    geometry: Literal["native", "full"] = "native"
    """Clips as the model sees them: native is the checkpoint's own frames and size, full all stored frames at the stored size with positions interpolated."""

    frames: int | Literal["all"] | None = None
    """Frames of a clip in place of what --geometry says; all is every stored frame, rounded up to whole tubelets by repeating the last."""

    size: int | None = None
    """Height and width of a clip in pixels in place of what --geometry says, a multiple of the patch."""

    sampling: Sampling | None = None
    """Which frames of a snippet: uniform spreads them over all of it, dense takes consecutive ones at a random place, centre those in its middle;
    default: as the checkpoint was fine-tuned by us, uniform otherwise."""

    use_keypoints: Literal["none", "channel"] = "none"
    """Whether the joints' mask is a fourth input channel; its weights start at zero, so that training starts from the checkpoint's own answers."""

    keypoints_dropout: float = 0.2
    """Share of the training clips whose joints are hidden, so that the model stays of use without them."""

    drop_path: float = 0.0
    """Chance that a clip skips a branch of the last layer in training, falling linearly to 0 at the first; both official recipes take 0.1."""

    head_init_scale: float = 0.001
    """Factor on the new head's normal(0.02) weights: near 0, all classes start equally likely and the encoder starts unharmed (VideoMAE's recipe)."""

    freeze: bool = False
    """Train the head, and the keypoints' channel if there is one, and nothing else: a linear probe."""

    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only each layer's input and compute the layer again in the backward pass, a third more work; auto: where one clip would not fit otherwise."""

    compile: bool = False
    """Compile the model: minutes at the first step, faster ones after it."""

    mean: Triple | None = None
    """Pixel means of the checkpoint, 0 to 1, in its own channel order; overrides its preprocessor_config.json."""

    std: Triple | None = None
    """Pixel standard deviations of the checkpoint, 0 to 1, in its own channel order; overrides its preprocessor_config.json."""

    channel_order: ChannelOrder | None = None
    """The channel order that the checkpoint was trained on; our clips are RGB and are turned inside the model."""

    def __post_init__(self) -> None:
        if not self.model_name.strip():
            raise InputError("--model-name: empty; expected a model's name, a local checkpoint or owner/name.")
        self._check_choices()
        if self.frames is not None and self.frames != "all" and not (isinstance(self.frames, int) and self.frames >= 1):
            raise InputError(f"--frames {self.frames}: expected all, or a number of at least 1.")
        if self.size is not None and self.size < 1:
            raise InputError(f"--size {self.size}: expected at least 1.")
        if not 0 <= self.keypoints_dropout <= 1:
            raise InputError(f"--keypoints-dropout {self.keypoints_dropout}: expected 0 to 1.")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"--drop-path {self.drop_path}: expected 0 to below 1.")
        if not self.head_init_scale > 0:
            raise InputError(f"--head-init-scale {self.head_init_scale}: expected more than 0, 1 for normal(0.02).")
        if self.mean is not None and not all(0 <= value <= 1 for value in self.mean):
            raise InputError(f"--mean {_spelled(self.mean)}: expected three numbers from 0 to 1. Divide means of bytes by 255.")
        if self.std is not None and not all(0 < value <= 1 for value in self.std):
            raise InputError(f"--std {_spelled(self.std)}: expected three numbers above 0, at most 1. Divide deviations of bytes by 255.")

    def _check_choices(self) -> None:
        """A config.json of an earlier run passes no command line parser."""
        choices: dict[str, tuple[object, ...]] = {
            "geometry": ("native", "full"),
            "sampling": (None, "uniform", "dense", "centre"),
            "use_keypoints": ("none", "channel"),
            "activation_checkpointing": ("auto", "on", "off"),
            "channel_order": (None, "rgb", "bgr"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {' or '.join(str(value) for value in allowed if value)}.")


def _spelled(values: Triple) -> str:
    """As one types them."""
    return " ".join(map(str, values))
