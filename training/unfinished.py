"""Predictions that are not all there yet: OUTPUT.part beside the file they will become, so that a killed run goes on where it stood.

A first line says what predicts; then comes a line a clip, with a stamp of its file: a file that changed is predicted again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clips.errors import InputError
from clips.files import sync_folder, write_whole

Row = tuple[str, str, list[float]]  # key, stamp, probabilities


class Unfinished:
    """The lines of OUTPUT.part. `identity` is what all its probabilities depend on: the model, its classes, the views, the precision."""

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:  # Any: JSON values
        self.path = output.with_name(f"{output.name}.part")
        self._identity = json.loads(json.dumps(identity))

    def open(self) -> dict[tuple[str, str], list[float]]:
        """Probabilities by key and stamp of what an earlier run finished; begins the file where there is none.

        Raises InputError for a file of another model, of other classes, views or precision.
        """
        first = json.dumps(self._identity).encode() + b"\n"
        blob = self.path.read_bytes() if self.path.exists() else b""
        lines = blob[: blob.rfind(b"\n") + 1].splitlines(keepends=True)  # what follows the last end of line was cut off by a kill
        if not lines:
            write_whole(self.path, first)
            return {}
        try:
            found, *rows = [json.loads(line) for line in lines]
            self._check(found)
            done = {(key, stamp): list(map(float, row)) for key, stamp, row in rows}
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path}: is damaged ({error}). Remove it to start anew.") from error
        if len(blob) > sum(map(len, lines)):
            os.truncate(self.path, sum(map(len, lines)))
        return done

    def append(self, rows: Iterable[Row]) -> None:
        """The clips are kept, whatever happens from here on."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The finished file is there."""
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)

    def _check(self, found: object) -> None:
        if not isinstance(found, dict):
            raise ValueError("no first line")
        if differing := [name for name in self._identity if found.get(name) != self._identity[name]]:
            raise InputError(
                f"{self.path}: an unfinished run had another {', another '.join(differing)}. "
                "Run that command to its end, or remove the file to start anew, or name another --output."
            )
