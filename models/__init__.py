"""Names to models that eat uint8 clips: `build_model(config, class_names)` to train, `load_trained(folder)` to predict.

    uint8 (B, T, H, W, 3) RGB -> model -> logits (B, K)

A model also has `.spec` (the ClipSpec that it takes), `.sampling` (which frames of a snippet), `.uses_keypoints`, `.describe()` (lines
for the log) and `.save(folder, class_names, note)`; what it costs says `models.costs.estimate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clips.clip import ClipSpec
from clips.errors import InputError
from clips.registry import resolve

from .config import ModelConfig

if TYPE_CHECKING:  # torch and transformers cost seconds: they are imported when a model is built
    from .checkpoints import Checkpoint
    from .classifier import ClipClassifier

__all__ = ["ARCHITECTURES", "MODELS", "ModelConfig", "architecture_of", "build_model", "load_trained"]

MODELS = {  # --model-name -> (config, class_names, source) -> model
    "videomae": "models.videomae:pretrained",
    "timesformer": "models.timesformer:pretrained",
    "videomae-tiny": "models.videomae:tiny",
    "timesformer-tiny": "models.timesformer:tiny",
}
ARCHITECTURES = {  # a config.json's model_type -> the class that takes such a checkpoint
    "videomae": "models.videomae:VideoMAE",
    "timesformer": "models.timesformer:TimeSformer",
}


def build_model(config: ModelConfig, class_names: Sequence[str], source: ClipSpec | None = None) -> ClipClassifier:
    """The start weights with a new head for the classes, on the CPU, in training mode.

    `source` is the geometry of the stored clips: --geometry full and --frames all take theirs from it.
    """
    if config.model_name in MODELS:
        return resolve(MODELS, config.model_name, "--model-name")(config, class_names, source)
    from .build import from_checkpoint
    from .checkpoints import read_checkpoint

    checkpoint = read_checkpoint(config.model_name)
    return from_checkpoint(architecture_of(checkpoint), checkpoint, config, class_names, source)


def load_trained(folder: str | Path) -> tuple[ClipClassifier, tuple[str, ...]]:
    """A saved model with its head, on the CPU, in evaluation mode, and its class names in label order."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; expected a saved model, such as the folder best of a run.")
    from .build import from_checkpoint
    from .checkpoints import read_checkpoint

    checkpoint = read_checkpoint(str(Path(folder).absolute()))
    names = checkpoint.class_names()
    model = from_checkpoint(architecture_of(checkpoint), checkpoint, ModelConfig(str(folder)), names, keep_head=True)
    return model.eval(), names


def architecture_of(checkpoint: Checkpoint) -> type[ClipClassifier]:
    """The class for a checkpoint's model_type; another architecture is an InputError."""
    found = checkpoint.values.get("model_type")
    if found not in ARCHITECTURES:
        raise InputError(
            f"{checkpoint.name}: config.json says model_type {found!r}; expected one of {', '.join(ARCHITECTURES)}. Give a checkpoint of one of these models."
        )
    return resolve(ARCHITECTURES, found, "model_type")
