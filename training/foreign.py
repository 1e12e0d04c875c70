"""Predictions files of any origin, as far as they name clips and probabilities: ours, and other scripts' with numbers for classes.

Columns: a key (or path, file …); p_<class> for each class or one probability; a label, by name or number, where there is one.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clips.errors import InputError
from clips.registry import nearest

from .metrics import FIRST_COLUMNS

KEY_COLUMNS = ("key", "path", "file", "filename", "file_path", "filepath", "clip", "video", "name", "snippet")
LABEL_COLUMNS = ("label", "target", "true", "y_true", "gt", "class")
SINGLE_COLUMNS = ("probability", "prob", "p", "score", "y_score", "p_positive")
CLASS_PREFIXES = ("p_", "prob_", "probability_", "score_", "p", "prob", "")
DELIMITERS = (",", "\t", ";")
ROUNDING = 0.02  # that probabilities of a clip may miss 1 by: some scripts write two digits


@dataclass(frozen=True)
class Row:
    """A clip: `label` is a class's index, None where it is unknown; `probabilities` (K,) is None for a clip that was not read."""

    key: str
    label: int | None
    probabilities: Sequence[float] | None
    source: str | None


@dataclass(frozen=True)
class Columns:
    """Where things stand in a file; `of_class` are the columns of probabilities in label order, a single one the last class's of two."""

    key: str
    of_class: Sequence[str]
    label: str | None
    numbers: Sequence[str]  # class names in the order that the file's numbers 0, 1, … mean


def read_any(path: Path, class_names: Sequence[str], class_order: Sequence[str]) -> list[Row]:
    """The rows; `class_order` says which classes the file's numbers mean, or, with a single probability, that it is the last one's."""
    header, lines = _read(path)
    columns = _columns(path, header, class_names, class_order)
    rows = [_row(f"{path}, line {line}", cells, columns, class_names) for line, cells in lines]
    seen: dict[str, Row] = {}
    for row in rows:
        if row.key in seen:
            raise InputError(f"{path}: clip {row.key!r} comes twice; expected a row a clip.")
        seen[row.key] = row
    return rows


def class_names_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """The names in the columns p_<class> of the first file of ours, whose columns are in label order, or else of the first that has names."""
    named = []
    for path in paths:
        header, _ = _read(path)
        found = tuple(name.removeprefix("p_") for name in header if name.startswith("p_"))
        if len(found) > 1 and not all(name.isdecimal() for name in found):
            named.append((tuple(header[: len(FIRST_COLUMNS)]) != FIRST_COLUMNS, found))
    return min(named, key=lambda pair: pair[0])[1] if named else ()


def _read(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header, and each line's number and cells."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a table ({error}). Give a CSV file of predictions.") from error
    first = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(keepends=True), delimiter=max(DELIMITERS, key=first.count))
    header = [name.strip() for name in next(reader, [])]
    if len(set(header)) < len(header):
        raise InputError(f"{path}: a column's name comes twice in {', '.join(header)}.")
    lines = []
    for cells in reader:
        if len(cells) not in (0, len(header)):
            raise InputError(f"{path}, line {reader.line_num}: {len(cells)} cells; expected {len(header)}. Write the file again.")
        if cells:
            lines.append((reader.line_num, dict(zip(header, cells, strict=True))))
    return header, lines


def _columns(path: Path, header: Sequence[str], class_names: Sequence[str], class_order: Sequence[str]) -> Columns:
    lower = {name.lower(): name for name in header}

    def first(names: Sequence[str]) -> str | None:
        return next((lower[name] for name in names if name in lower), None)

    numbers = class_order or class_names
    key, of_class = first(KEY_COLUMNS), _probability_columns(header, lower, class_names, class_order)
    found = f"found {', '.join(header) or 'an empty file'}"
    if key is None:
        raise InputError(f"{path}: no column names the clips; expected one of {', '.join(KEY_COLUMNS)}; {found}.")
    if not of_class:
        wanted = f"p_{', p_'.join(class_names)}" + (f", or of two classes one of {', '.join(SINGLE_COLUMNS)}" if len(class_names) == 2 else "")
        hint = "" if class_order else " Where its columns are numbered, say with --class-order which class each number means."
        raise InputError(f"{path}: no probabilities; expected columns {wanted}; {found}.{hint}")
    return Columns(key, of_class, first(LABEL_COLUMNS), numbers)


def _probability_columns(header: Sequence[str], lower: Mapping[str, str], class_names: Sequence[str], class_order: Sequence[str]) -> list[str]:
    """By class names in label order; by numbers, which only --class-order explains; or a single one, of the last class of the order."""
    spellings = [list(class_names)] + ([[str(class_order.index(name)) for name in class_names]] if class_order else [])
    for spelling in spellings:
        for prefix in CLASS_PREFIXES:
            names = [f"{prefix}{name}" for name in spelling]
            if all(name in header for name in names):
                return names
    order = class_order or class_names
    single = next((lower[name] for name in (*SINGLE_COLUMNS, f"p_{order[-1]}".lower()) if name in lower), None)
    return [single] if single is not None and len(class_names) == 2 else []


def _row(where: str, cells: Mapping[str, str], columns: Columns, class_names: Sequence[str]) -> Row:
    probabilities = _probabilities(where, [cells[name].strip() for name in columns.of_class], columns, class_names)
    label = _class(where, cells[columns.label], columns, class_names) if columns.label else None
    return Row(cells[columns.key].strip(), label, probabilities, cells.get("source") or None)


def _probabilities(where: str, cells: Sequence[str], columns: Columns, class_names: Sequence[str]) -> list[float] | None:
    if not any(cells):
        return None
    try:
        found = [float(cell) for cell in cells]
    except ValueError:
        found = [-1.0]
    if not all(0 <= one <= 1 for one in found):
        raise InputError(f"{where}: probabilities {', '.join(cells)}; expected 0 … 1.")
    if len(found) == 1:
        last = list(class_names).index(columns.numbers[-1])
        return [found[0] if index == last else 1 - found[0] for index in range(2)]
    if abs(sum(found) - 1) > ROUNDING:
        raise InputError(f"{where}: probabilities {', '.join(cells)} add up to {sum(found):.3f}; expected 1.")
    return found


def _class(where: str, cell: str, columns: Columns, class_names: Sequence[str]) -> int | None:
    """A class's index from its name or the file's number for it."""
    text = cell.strip().removesuffix(".0")
    if not text:
        return None
    if text in class_names:
        return list(class_names).index(text)
    if text.isdecimal() and int(text) < len(columns.numbers):
        return list(class_names).index(columns.numbers[int(text)])
    raise InputError(f"{where}: class {cell!r}; expected one of {', '.join(class_names)}, or its number.{nearest(class_names, text)}")


def matched(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of places whose keys name one clip: the same texts, or paths whose last three, two or one parts are the same.

    The reading is taken that pairs most, among those in which no file has a name twice.
    """
    best: list[tuple[int, int]] = []
    for parts in (None, 3, 2, 1):
        names = [[_tail(key, parts) for key in keys] for keys in (first, second)]
        if all(len(set(one)) == len(one) for one in names):
            places = {name: place for place, name in enumerate(names[1])}
            best = max(best, [(place, places[name]) for place, name in enumerate(names[0]) if name in places], key=len)
    return best


def _tail(key: str, parts: int | None) -> str:
    """The last parts of a path as keys spell them: without .npz, dots replaced."""
    if parts is None:
        return key
    return "/".join(PurePosixPath(key.replace("\\", "/").removesuffix(".npz").replace(".", "_")).parts[-parts:])
