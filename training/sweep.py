"""A sweep: a file with a run's flags in each line; each run has a folder named after its flags, and none evaluates test.

    runs/sweep.txt, line 2:   --lr 1e-3 --seed 2          element 2 of the job array trains LOGGER_FOLDER/lr-1e-3_seed-2
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clips.environment import Array
from clips.errors import InputError

logger = logging.getLogger(__name__)

MAX_NAME = 120  # characters; file systems allow 255 bytes, and the name stands in every table
KEPT_FLAGS = ("sweep", "line", "logger-folder", "config")  # the command's own, not a line's


@dataclass(frozen=True)
class SweepConfig:
    """Which of many runs this one is."""

    sweep: Path | None = None
    """A file with the flags of a run in each line, such as `--lr 1e-3 --seed 2`: this run takes a line, lies in LOGGER_FOLDER/NAME and leaves test alone."""
    line: int | None = None
    """The line of --sweep, from 1, empty lines and those with # left out; default: this job's element of its SLURM array."""


def with_line(args: Sequence[str], array: Array | None) -> list[str]:
    """A command line with what its line of --sweep asks for: the line's flags, its own folder, no test. Without --sweep as it is."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    asked.add_argument("--sweep", type=Path)
    asked.add_argument("--line")
    asked.add_argument("--logger-folder", "--logger_folder", type=Path)
    try:
        known = asked.parse_known_args(args)[0]
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}. Give it its value.") from error
    if known.sweep is None:
        if known.line is not None:
            raise InputError("--line: picks a line of --sweep. Give --sweep FILE too, or leave it out.")
        return [*args]
    lines = read_lines(known.sweep)
    number = chosen(known.sweep, known.line, array, len(lines))
    name = names(lines)[number - 1]
    logger.info(f"sweep: line {number} of {len(lines)}: {shlex.join(lines[number - 1])} -> {name}; test stays unseen")
    folder = ["--logger-folder", str(known.logger_folder / name)] if known.logger_folder else []
    return [*args, *lines[number - 1], *folder, "--no-evaluate-test"]


def read_lines(path: Path) -> list[list[str]]:
    """Each line's words; InputError for a file that is no sweep."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or error
        raise InputError(f"--sweep {path}: expected a file with the flags of a run in each line; found: {found}.") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"--sweep {path}, line {number}: {line.strip()}: {error}. Close the quotes.") from error
        if not words:
            continue
        if not words[0].startswith("--"):
            raise InputError(f"--sweep {path}, line {number}: expected flags such as --lr 1e-3, found {words[0]}.")
        for word in words:
            if word.startswith("--") and word[2:].split("=")[0].replace("_", "-") in KEPT_FLAGS:
                raise InputError(f"--sweep {path}, line {number}: {word} belongs to the command, not to a line. Take it out.")
        lines.append(words)
    if not lines:
        raise InputError(f"--sweep {path}: holds no line of flags; expected one for each run, such as --lr 1e-3 --seed 2.")
    names(lines, str(path))
    return lines


def chosen(path: Path, line: str | None, array: Array | None, num_lines: int) -> int:
    """The line that this run takes, from 1."""
    if line is not None:
        if not line.isdecimal() or not 1 <= int(line) <= num_lines:
            raise InputError(f"--line {line}: expected 1 to {num_lines}, the lines of {path}.")
        return int(line)
    if array is None:
        raise InputError(f"--sweep {path}: which of its {num_lines} lines? Give --line, or submit a job array: sbatch --array=1-{num_lines} …")
    if not 1 <= array.element <= num_lines:
        raise InputError(f"--sweep {path}: element {array.element} of the job array has no line; expected --array=1-{num_lines}.")
    return array.element


def names(lines: Sequence[Sequence[str]], path: str = "") -> list[str]:
    """Each line's folder name, made of its flags alone, so that lines may be added and moved; InputError for two lines with one name."""
    found = [name_of(words) for words in lines]
    if twice := sorted({name for name in found if found.count(name) > 1}):
        advice = "Take out the others, or give their paths different last parts."
        raise InputError(f"--sweep {path}: {found.count(twice[0])} lines make the run {twice[0]}; expected each once. {advice}")
    return found


def name_of(words: Sequence[str]) -> str:
    """`lr-1e-3_seed-2` for --lr 1e-3 --seed 2, of paths the last part; long ones end in a sum of the rest."""
    parts: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            parts.append(word[2:].replace("_", "-").split("=", 1))
        else:
            parts[-1].append(word)
    spelled = ["-".join([part[0], *map(_short, part[1:])]) for part in parts]
    name = re.sub(r"[^\w.+=-]", "-", "_".join(spelled), flags=re.ASCII)
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 9]}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"


def _short(value: str) -> str:
    """Of a path from the root or from home the last part; 2/5 is no path."""
    return Path(value).name or value if value.startswith(("/", "~")) else value
