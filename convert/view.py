"""A contact sheet of clips, as one picture or one page: what is in the shards, or what a run got most wrong.

choose -> (sheet.py | page.py) -> one whole file
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import tyro

from clips.errors import InputError
from clips.files import whole_file
from clips.glimpse import expect_shards
from clips.manifest import Manifest, read_index, read_manifest
from clips.mix import permutation
from clips.registry import check_name, nearest

from .page import write_page
from .sheet import write_picture
from .shown import Pick, Sheet

logger = logging.getLogger(__name__)

WRITERS = {".html": write_page, ".png": write_picture}
FIRST_COLUMNS = ("key", "split", "label", "prediction")  # of a run's predictions; between them and the last, p_<class>
LAST_COLUMNS = ("source", "begin_ms", "end_ms")


@dataclass(frozen=True)
class ViewConfig:
    """Shows clips with their keypoints: a page that plays them (html), or a picture of their frames (png)."""

    shards: tyro.conf.Positional[Path]
    """The folder that pack wrote."""
    output: Path
    """The file to write; its suffix, .html or .png, decides which."""
    split: str | None = None
    """Only this split; default: all."""
    label: str | None = None
    """Only clips of this class; default: as many of each."""
    clips: int = 24
    """How many clips to show; without --predictions."""
    seed: int = 0
    """Same seed, same clips."""
    predictions: Path | None = None
    """A run's predictions-SPLIT.csv: shows its errors, those first of which it was most certain."""
    worst: int = 40
    """How many errors to show; with --predictions."""

    def __post_init__(self) -> None:
        if self.output.suffix.lower() not in WRITERS:
            raise InputError(f"--output {self.output}: expected a name that ends in {' or '.join(sorted(WRITERS))}.")
        for flag, number in (("--clips", self.clips), ("--worst", self.worst)):
            if number < 1:
                raise InputError(f"{flag} {number}: expected at least 1.")


@dataclass(frozen=True)
class Mistake:
    """A clip that a run took for something else, and the probability that it gave to that."""

    key: str
    label: str
    prediction: str
    probability: float


def view(config: ViewConfig) -> int:
    """0 when the sheet is written; one line on stdout says what it shows."""
    expect_shards(config.shards)
    manifest = read_manifest(config.shards)
    check_folder(config.output, "--output")
    if config.split is not None:
        check_name(manifest.splits, config.split, "--split")
    if config.label is not None:
        check_name(manifest.classes, config.label, "--label")
    sheet = _clips_sheet(config, manifest) if config.predictions is None else _mistakes_sheet(config, manifest, config.predictions)
    try:
        with whole_file(config.output) as file:
            WRITERS[config.output.suffix.lower()](sheet, file)
    except OSError as error:
        raise InputError(f"--output {config.output}: cannot be written ({error.strerror or error}). Name another file.") from error
    print(f"{config.output}: {sheet.sentence}, {config.output.stat().st_size / 1e6:.1f} MB")
    return 0


def check_folder(file: Path, flag: str) -> None:
    """Raises InputError where a file cannot be made: its folder is missing, or a folder has its name."""
    if not file.parent.is_dir():
        raise InputError(f"{flag} {file}: the folder {file.parent} does not exist. Make it, or name another.")
    if file.is_dir():
        raise InputError(f"{flag} {file}: is a folder; expected the name of a file.")


def _clips_sheet(config: ViewConfig, manifest: Manifest) -> Sheet:
    there = [pick for pick in _all(config, manifest) if config.label is None or pick.label == config.label]
    if not there:
        raise InputError(f"{config.shards}: no clip{_of(config)}. Leave out --split or --label.")
    chosen = choose(there, config.clips, config.seed)
    whole = len(chosen) == len(there)
    sentence = f"all {len(there)} clips{_of(config)}" if whole else f"{len(chosen)} of {len(there)} clips{_of(config)}, chosen with seed {config.seed}"
    return Sheet(config.shards, manifest, _title(manifest), sentence, chosen)


def choose(picks: list[Pick], count: int, seed: int) -> tuple[Pick, ...]:
    """At most `count` of them, as many of each label as there are, sorted by label and key; which ones, `seed` alone decides."""
    by_label: dict[int, list[Pick]] = {}
    for pick in sorted(picks, key=_key):
        by_label.setdefault(pick.entry.facts.label, []).append(pick)
    shuffled = [[members[place] for place in permutation(len(members), "view", seed, label)] for label, members in sorted(by_label.items())]
    rounds = [pick for one_of_each in zip_longest(*shuffled) for pick in one_of_each if pick is not None]
    return tuple(sorted(rounds[:count], key=lambda pick: (pick.entry.facts.label, _key(pick))))


def _mistakes_sheet(config: ViewConfig, manifest: Manifest, path: Path) -> Sheet:
    mistakes, num_judged = read_mistakes(path, manifest.classes, config.split, config.label)
    picks = {pick.entry.facts.key: pick for pick in _all(config, manifest)}
    for mistake in mistakes:
        _check_same(mistake, picks.get(mistake.key), path, config.shards)
    worst = mistakes[: config.worst]
    chosen = tuple(replace(picks[mistake.key], prediction=mistake.prediction, probability=mistake.probability) for mistake in worst)
    if not mistakes:
        sentence = f"no errors: all {num_judged} predictions{_of(config)} in {path.name} are right"
    elif len(worst) < len(mistakes):
        sentence = f"the {len(worst)} most certain of {len(mistakes)} errors among {num_judged} predictions{_of(config)} in {path.name}"
    else:
        sentence = f"all {len(mistakes)} errors among {num_judged} predictions{_of(config)} in {path.name}, the most certain first"
    return Sheet(config.shards, manifest, _title(manifest), sentence, chosen)


def read_mistakes(path: Path, classes: tuple[str, ...], split: str | None = None, label: str | None = None) -> tuple[list[Mistake], int]:
    """The wrong predictions, most probable first, and the number of predictions that could be judged.

    Clips without a label or a prediction are left out and counted in the log. Raises InputError for another kind of file.
    """
    mistakes, num_judged, num_left_out = [], 0, 0
    for line, cells in _rows(path, (*FIRST_COLUMNS, *(f"p_{name}" for name in classes), *LAST_COLUMNS)):
        if (split is not None and cells["split"] != split) or (label is not None and cells["label"] != label):
            continue
        if not cells["label"] or not cells["prediction"]:
            num_left_out += 1
            continue
        for column in ("label", "prediction"):
            if cells[column] not in classes:
                raise InputError(f"{path}, line {line}: {column} {cells[column]!r}; expected one of {', '.join(classes)}.{nearest(classes, cells[column])}")
        num_judged += 1
        if cells["prediction"] != cells["label"]:
            mistakes.append(Mistake(cells["key"], cells["label"], cells["prediction"], _probability(path, line, cells[f"p_{cells['prediction']}"])))
    if num_left_out:
        logger.info(f"{path}: {num_left_out} clips have no label or no prediction and are left out")
    if not num_judged:
        raise InputError(f"{path}: no prediction of a labelled clip to show. Take a file of this split and label, or leave out --split and --label.")
    return sorted(mistakes, key=lambda mistake: (-mistake.probability, mistake.key.encode())), num_judged


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row; InputError unless the columns are just these."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header) != columns:
                found = ",".join(header)[:200] or "an empty file"
                raise InputError(f"{path}: expected the columns {','.join(columns)}; found {found}. Give a run's predictions-SPLIT.csv on these classes.")
            for row in reader:
                if len(row) != len(columns):
                    raise InputError(f"{path}, line {reader.line_num}: {len(row)} cells; expected {len(columns)}. Write the file again.")
                yield reader.line_num, dict(zip(columns, row, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error}). Give a run's predictions-SPLIT.csv.") from error
    except OSError as error:
        raise InputError(f"--predictions {path}: cannot be read ({error.strerror or error}). Give a run's predictions-SPLIT.csv.") from error


def _probability(path: Path, line: int, text: str) -> float:
    try:
        probability = float(text)
    except ValueError:
        probability = math.nan
    if not 0 <= probability <= 1:
        raise InputError(f"{path}, line {line}: probability {text!r}; expected 0 … 1. Write the file again.")
    return probability


def _check_same(mistake: Mistake, pick: Pick | None, path: Path, shards: Path) -> None:
    """Raises InputError where the predictions are of other clips than the shards'."""
    if pick is None:
        raise InputError(f"{path}: clip '{mistake.key}' is not in {shards}. Name the shards that the run was evaluated on.")
    if pick.label != mistake.label:
        raise InputError(f"{path}: clip '{mistake.key}' is {mistake.label} there and {pick.label} in {shards}. Name the shards that the run was evaluated on.")


def _all(config: ViewConfig, manifest: Manifest) -> list[Pick]:
    wanted = [config.split] if config.split is not None else list(manifest.splits)
    return [
        Pick(split, shard.name, entry, manifest.classes[entry.facts.label])
        for split in wanted
        for shard in manifest.splits[split].shards
        for entry in read_index(config.shards, split, shard).clips
    ]


def _of(config: ViewConfig) -> str:
    """` of gesture in val`, as far as the flags say so."""
    return (f" of {config.label}" if config.label else "") + (f" in {config.split}" if config.split else "")


def _title(manifest: Manifest) -> str:
    return str(manifest.home.get("folder", "clips"))


def _key(pick: Pick) -> bytes:
    return pick.entry.facts.key.encode()
