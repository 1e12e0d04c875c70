"""train.py's flags as far as the doctor knows them; all others are left to train.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clips import command
from clips.environment import Array
from clips.errors import InputError

from .sweep import names, read_lines, with_line

KNOWN = ("dataset-home", "logger-folder", "model-name", "stage-dir", "threads", "device", "fold", "config")


@dataclass(frozen=True)
class Asked:
    """What a run is asked for; None: not said."""

    dataset_home: Path | None = None
    stage_dir: Path | None = None
    model_name: str | None = None
    threads: int | None = None
    device: str = "auto"
    fold: str | None = None
    sweep: Path | None = None
    runs: tuple[Path, ...] = ()  # the folders of all runs of the sweep, or the only one
    run: int | None = 0  # which of them is this one; None: the sweep's line is not said
    error: str | None = None  # of the sweep's file or of --config


def read_flags(args: Sequence[str], array: Array | None) -> Asked:
    """What `args` and this element's line of their --sweep ask for. Raises nothing: train.py names what is wrong with a flag."""
    given, of_sweep, error = _values(args, KNOWN), _values(args, ("sweep", "line")), None
    sweep, runs = _path(of_sweep.get("sweep")), given.get("logger-folder")
    folders: tuple[Path, ...] = (Path(runs),) if runs else ()
    run: int | None = 0
    if sweep is not None:
        try:
            lines, run = read_lines(sweep), None
            folders = tuple(Path(runs) / name for name in names(lines)) if runs else ()
            if "line" in of_sweep or array is not None:
                given = _values(with_line(args, array), KNOWN)
                run = folders.index(Path(given["logger-folder"])) if runs else None
        except InputError as wrong:
            error = str(wrong)
    try:
        given = _of_config(given.get("config")) | given
    except InputError as wrong:
        error = str(wrong)
    return Asked(
        dataset_home=_path(given.get("dataset-home")),
        stage_dir=_path(given.get("stage-dir")),
        model_name=given.get("model-name"),
        threads=int(threads) if (threads := given.get("threads", "")).isdecimal() and int(threads) else None,
        device=given.get("device", "auto"),
        fold=given.get("fold"),
        sweep=sweep,
        runs=folders,
        run=run,
        error=error,
    )


def _values(args: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """The values of these flags, the last of each."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in known:
        parser.add_argument(*{f"--{name}", f"--{name.replace('-', '_')}"}, dest=name, nargs="?")
    found = vars(parser.parse_known_args([*args])[0])
    return {name: value for name, value in found.items() if value is not None}


def _of_config(path: str | None) -> dict[str, str]:
    """The same flags out of an earlier run's config.json; a new run has a folder of its own."""
    values = command.read_values(Path(path), ()) if path else {}
    names = {name: name.replace("-", "_") for name in KNOWN if name not in ("config", "logger-folder")}
    return {name: str(values[key]) for name, key in names.items() if values.get(key) is not None} if isinstance(values, dict) else {}


def _path(text: str | None) -> Path | None:
    return Path(text) if text is not None else None
