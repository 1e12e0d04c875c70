"""`python -m models fetch NAME`: a checkpoint into the Hugging Face cache, or as a plain folder, from where there is a network."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from clips.command import parse, run, show_log
from clips.errors import InputError
from clips.registry import check_name

from . import MODELS, ModelConfig, architecture_of

if TYPE_CHECKING:  # torch is not needed to print help
    from .checkpoints import Checkpoint
    from .classifier import ClipClassifier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetch:
    """What to bring, and where to."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """videomae, timesformer, or owner/name on the hub; with --output also a local checkpoint."""

    output: Path | None = None
    """A new folder for config, safetensors weights, preprocessor_config and README; without it the Hugging Face cache keeps the files."""


def main(args: Sequence[str] | None = None) -> int:
    """The exit code of `python -m models VERB ...`."""
    verb, *rest = (sys.argv[1:] if args is None else list(args)) or ["--help"]
    if verb in ("-h", "--help"):
        print(f"usage: python -m models fetch NAME [--output DIR]\n\n{__doc__}")
        return 0
    return run(lambda: _dispatch(verb, rest))


def _dispatch(verb: str, rest: Sequence[str]) -> None:
    check_name(["fetch"], verb, "python -m models")
    show_log()
    fetch(parse(Fetch, "python -m models fetch", "Brings a checkpoint into the Hugging Face cache, or writes it as a plain folder.", rest))


def fetch(config: Fetch) -> None:
    """Downloads, or converts into `output`; checks that a model takes it and logs what it found, with licence, size and place."""
    from . import build, checkpoints, hub  # torch is not needed to print help

    if config.output is not None and config.output.exists():
        raise InputError(f"--output {config.output}: already there; expected a new folder. Remove it or give another one.")
    name = hub.HUB_IDS.get(config.name, config.name)
    if name in MODELS:
        raise InputError(f"{name}: starts from random weights; there is nothing to fetch.")
    local = Path(name).expanduser().exists()
    if local and config.output is None:
        raise InputError(f"{name}: is already here. Give --output to write it as a plain folder.")
    if hub.is_hub_id(name) and not local and hub.cached(name) is None:
        hub.download(name)
    checkpoint = checkpoints.read_checkpoint(name)
    model = build.from_checkpoint(architecture_of(checkpoint), checkpoint, ModelConfig(name), ("a", "b"))
    for line in (*model.describe()[:3], *checkpoint.notes):
        logger.info("%s", line)
    place = checkpoint.folder if config.output is None else _convert(checkpoint, model, config.output)
    num_bytes = sum(file.stat().st_size for file in place.iterdir() if file.is_file())
    logger.info("%s: %.1f MB in %s, licence %s", name, num_bytes / 1e6, place, model.origin.licence)


def _convert(checkpoint: Checkpoint, model: ClipClassifier, output: Path) -> Path:
    """The checkpoint with all its tensors, head and names, as a folder of its own: complete or absent."""
    from . import folder

    temporary = output.with_name(f".{output.name}.{os.getpid()}.{secrets.token_hex(4)}")
    names = list((checkpoint.values.get("id2label") or {}).values())
    card = folder.model_card(model.origin, model.plain_name, model.pixels, model.spec, names, None, model.cautions())
    try:
        folder.write_folder(temporary, checkpoint.values, checkpoint.tensors or {}, model.pixels, model.spec, card, model.sampling)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


if __name__ == "__main__":
    sys.exit(main())
