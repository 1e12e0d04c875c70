"""Checkpoints as they lie on disk: a transformers folder or a state dict file, local or from the hub.

    name -> folder or file -> config.json + tensors + preprocessor_config.json -> Checkpoint

transformers' own loading fills what does not fit with fresh or even uninitialised numbers; here nothing is loaded into a model
yet, so that `keys.fit` can compare every key.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clips.errors import InputError
from clips.registry import nearest

from . import MODELS
from .hub import HUB_IDS, PROCESSORS, WEIGHTS, hub_folder, hub_id_of, is_hub_id
from .infer import infer_values
from .keys import has_head

PICKLES = (".pt", ".pth", ".bin")
NESTS = ("model", "state_dict", "module")  # where training scripts put the weights in their checkpoints
PREFIXES = ("module.", "model.", "_orig_mod.")  # DDP, wrappers, torch.compile


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's files say, unchanged but for the prefixes of its keys."""

    name: str
    folder: Path  # where the files lie
    values: dict[str, Any]  # of config.json
    tensors: dict[str, Tensor] | None  # None: fresh, seeded weights
    processor: dict[str, Any] = field(default_factory=dict)  # of preprocessor_config.json, empty if there is none
    processor_name: str = "preprocessor_config.json"
    hub_id: str | None = None
    card: dict[str, str] = field(default_factory=dict)  # the front matter of README.md
    notes: tuple[str, ...] = ()

    def class_names(self) -> tuple[str, ...]:
        """The names of a trained head in label order."""
        if not has_head(self.tensors or ()):
            raise InputError(f"{self.name}: has no classifier; expected a folder that training saved.")
        names = self.values.get("id2label")
        if not isinstance(names, dict) or sorted(names) != sorted(str(k) for k in range(len(names))) or not names:
            raise InputError(f"{self.name}: config.json has no id2label that numbers its classes from 0; expected a folder that training saved.")
        return tuple(str(names[str(k)]) for k in range(len(names)))


def read_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of that name: a registry name, a local folder or file, or owner/name on the hub."""
    path = Path(name).expanduser()
    if name in HUB_IDS:
        return read_checkpoint(HUB_IDS[name])
    if path.is_dir():
        return _read_folder(name, path, hub_id_of(path.absolute()))
    if path.is_file():
        return _read_file(name, path)
    if name.startswith(("/", ".", "~")) or path.suffix in (*PICKLES, ".safetensors"):
        raise InputError(f"--model-name {name}: no such file or folder; expected a checkpoint. Check the path.")
    if is_hub_id(name):
        return _read_folder(name, hub_folder(name), name)
    raise InputError(f"--model-name {name}: expected one of {', '.join(MODELS)}, a local checkpoint, or owner/name on the hub.{nearest(MODELS, name)}")


def _read_folder(name: str, folder: Path, hub_id: str | None) -> Checkpoint:
    """A transformers folder."""
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if not (folder / "config.json").is_file() or weights is None:
        hint = f" Did you mean {folder / 'best'}?" if (folder / "best" / "config.json").is_file() else ""
        raise InputError(f"{name}: expected a folder with config.json and {' or '.join(WEIGHTS)}; found {_listing(folder)}.{hint}")
    values = _read_json(folder / "config.json")
    return Checkpoint(name, folder, values, read_tensors(weights), hub_id=hub_id, card=_front_matter(folder), **_processor(folder))


def _read_file(name: str, file: Path) -> Checkpoint:
    """A state dict file; its config is the one beside it, or what its keys and shapes tell."""
    if file.suffix not in (*PICKLES, ".safetensors"):
        raise InputError(f"{name}: expected a folder or a file that ends in {', '.join(PICKLES)} or .safetensors.")
    tensors = read_tensors(file)
    folder = file.absolute().parent
    beside = folder / "config.json"
    values, notes = (_read_json(beside), ()) if beside.is_file() else infer_values(name, tensors)
    return Checkpoint(name, folder, values, tensors, hub_id=hub_id_of(folder), card=_front_matter(folder), notes=notes, **_processor(folder))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, without the nests and prefixes that training scripts add. Pickled code is never run."""
    try:
        content: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"{file}: not readable as a file of tensors ({reason}). Expected a state dict: torch.save(model.state_dict(), ...).") from error
    while isinstance(content, Mapping) and any(isinstance(content.get(nest), Mapping) for nest in NESTS):
        content = next(content[nest] for nest in NESTS if isinstance(content.get(nest), Mapping))
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{file}: expected a state dict, keys to tensors, possibly under one of {', '.join(NESTS)}; found {_kinds(content)}.")
    return _unprefixed({str(key): value for key, value in content.items()})


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without a prefix that all of them carry."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            return _unprefixed({key.removeprefix(prefix): value for key, value in tensors.items()})
    return tensors


def _processor(folder: Path) -> dict[str, Any]:
    """Checkpoint's two fields about preprocessor_config.json."""
    for name in PROCESSORS:
        if (folder / name).is_file():
            return {"processor": _read_json(folder / name), "processor_name": name}
    return {}


def _front_matter(folder: Path) -> dict[str, str]:
    """The plain `key: value` lines between the first two `---` of README.md."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    head = text.split("---")[1] if text.startswith("---") and text.count("---") >= 2 else ""
    pairs = (line.split(":", 1) for line in head.splitlines() if ":" in line and not line.startswith((" ", "-")))
    return {key.strip(): value.strip(" \"'") for key, value in pairs if value.strip()}


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}). Copy the checkpoint again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(content).__name__}. Copy the checkpoint again.")
    return content


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "") if names else "nothing"


def _kinds(content: Any) -> str:  # Any: whatever a file held
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return ", ".join(f"{key}: {type(value).__name__}" for key, value in list(content.items())[:6]) or "nothing"
