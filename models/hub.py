"""Checkpoints of the Hugging Face hub: from this machine's cache, else from the network."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub

from clips.errors import InputError

HUB_IDS = {"videomae": "MCG-NJU/videomae-base-finetuned-ssv2", "timesformer": "facebook/timesformer-base-finetuned-ssv2"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
SIDE_FILES = ("config.json", *PROCESSORS, "README.md")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def hub_folder(name: str) -> Path:
    """The local folder of a hub checkpoint; one that can be had neither from the cache nor from the network is an InputError."""
    try:
        return cached(name) or download(name)
    except InputError as error:
        first = f"On a node without network, run python -m models fetch {name} on a login node first, with the same HF_HOME."
        raise InputError(f"--model-name {error} {first}") from error


def cached(name: str) -> Path | None:
    """The cached folder if it holds what a model needs; a cache can be half filled by another program."""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*SIDE_FILES, *WEIGHTS], local_files_only=True))
    except Exception:  # as above: whatever the client raises here means "not in the cache"
        return None
    complete = (folder / "config.json").exists() and any((folder / file).exists() for file in WEIGHTS)
    return folder if complete else None


def download(name: str) -> Path:
    """Brings config, processor, README and one weights file of a hub checkpoint into the cache."""
    try:
        present = {sibling.rfilename for sibling in huggingface_hub.HfApi().model_info(name).siblings or ()}
        weights = next((file for file in WEIGHTS if file in present), None)
        if weights is None:
            raise InputError(f"{name}: the hub has no {' or '.join(WEIGHTS)} of it. Give another checkpoint.")
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*SIDE_FILES, weights]))
    except InputError:
        raise
    except Exception as error:  # the client raises its own, httpx's and the system's errors, different ones from version to version
        reason = f"it is not in the Hugging Face cache, and the hub cannot be reached or does not have it ({_first_line(error)})"
        raise InputError(f"{name}: {reason}. Check network and spelling.") from error


def hub_id_of(path: Path) -> str | None:
    """The hub id that a path in a Hugging Face cache belongs to: `models--owner--name/snapshots/...`."""
    for part in path.parts:
        if part.startswith("models--") and part.count("--") >= 2:
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error).strip() else type(error).__name__
