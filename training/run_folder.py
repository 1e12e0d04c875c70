"""The folder that holds all of one run, so that the same command again continues it.

config.json  env.json  metrics.jsonl  tb/  checkpoints/  best/  predictions-<split>.csv  done | stopped.json
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clips.errors import InputError
from clips.files import whole_file, write_json

from . import machine

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

State = Literal["new", "resume", "finished"]
# What a resumed run may change: how clips are read, where things lie, when it stops and what it keeps; nothing that changes the result.
FREE = (
    *("dataset_home", "loader", "threads", "prefetch", "look_ahead", "decode_in", "stage_dir", "max_bad_clips"),
    *("micro_batch", "device", "log_every", "logger_folder", "checkpoint_minutes", "keep_optimizer", "max_skipped", "activation_checkpointing"),
    "evaluate_test",
)
MAY_GROW = "epochs"
PATIENCE = "patience"  # may change as freely: it says when a run ends, not what its epochs give; but runs that differ in it are not the same to `compare`
JOB_LOGS = (".out", ".err", ".log")  # SLURM may put a job's output here before the run starts


class RunFolder:
    """One run's folder; only rank 0 (`is_main`) writes, on the other ranks `log`, `cut_back`, `finish` and `stop` do nothing."""

    def __init__(self, path: Path, is_main: bool = True) -> None:
        self.path = path
        self.is_main = is_main
        self._began = False
        self.num_lines = 0  # of metrics.jsonl
        self._purge_step: int | None = None
        self._board: SummaryWriter | None = None

    def look(self, config: Mapping[str, Any], free: Collection[str] = ()) -> State:  # Any: JSON values
        """What a start with this configuration would be; nothing is written.

        Flags named in `free` and --patience may change between starts and `epochs` may grow: a finished run with more epochs is a "resume", and one that
        --patience ended with more patience. InputError for another configuration or somebody else's folder. Rank 0 asks and tells the others.
        """
        if not self.is_main:
            raise ValueError("RunFolder is for rank 0 to ask; broadcast its answer to the other ranks.")
        stored = self._stored_config()
        if stored is None:
            self._check_unused()
            return "new"
        config_json = as_read_back(config)
        check_same(self.path, stored, config_json, free)
        return "finished" if self._done.exists() and not grown(stored, config_json) and not more_patient(stored, config_json) else "resume"

    def begin(self, config: Mapping[str, Any]) -> None:  # Any: JSON values
        """From here on the folder says that it runs, with this configuration, on this machine."""
        if not self.is_main:
            return
        self._began = True
        self._done.unlink(missing_ok=True)
        write_json(self.path / "config.json", as_read_back(config))  # first: from here on the folder is ours
        starts = self.path / "env.json"
        write_json(starts, [*(read_json(starts) if starts.exists() else []), machine.describe()])  # each start: the next may be on another machine
        self._stopped.unlink(missing_ok=True)

    def log(self, record: Mapping[str, Any]) -> None:  # Any: JSON values
        """Appends `record`, which names its "step", to metrics.jsonl, and its numbers to TensorBoard under their own names.

        A number that is not finite is null in the line (JSON has no NaN) and itself in TensorBoard.
        """
        if not self.is_main:
            return
        step = record["step"]
        with open(self._metrics, "a", encoding="utf-8") as file:  # closed each time: also network file systems then show the line
            file.write(json.dumps(without_nan(record), allow_nan=False) + "\n")
        self.num_lines += 1
        board = self._tensorboard()
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                board.add_scalar(name, value, step)
        board.flush()

    def show(self, split: str, pictures: Mapping[str, np.ndarray], step: int) -> None:
        """Pictures uint8 (H, W, 3) to TensorBoard as <split>/<name>."""
        if self.is_main:
            from .plots import show_pictures  # matplotlib: half a second

            board = self._tensorboard()
            show_pictures(board, split, pictures, step)
            board.flush()

    def cut_back(self, step: int, num_lines: int | None = None) -> None:
        """Forgets what was logged after the checkpoint from which the run continues: after its `step`, and after its first `num_lines` lines."""
        if not self.is_main:
            return
        if self._metrics.exists():
            kept = [line for line, record in read_lines(self._metrics) if record["step"] <= step][:num_lines]
            with whole_file(self._metrics) as file:
                file.write("".join(line + "\n" for line in kept).encode())
            self.num_lines = len(kept)
        self._close_board()
        self._purge_step = step + 1  # TensorBoard drops this step and later ones of the files before

    def finish(self) -> None:
        """Says that the run has all its epochs: the same command then has nothing to do."""
        if self.is_main:
            with whole_file(self._done):
                pass
            self._stopped.unlink(missing_ok=True)
            self._close_board()

    def stop(self, reason: str) -> None:
        """Says why the run ended early; the next start removes it. Before `begin` the folder is not this run's, and nothing is written."""
        if self.is_main and self._began:
            write_json(self._stopped, {"reason": reason})
            self._close_board()

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _done(self) -> Path:
        return self.path / "done"

    @property
    def _stopped(self) -> Path:
        return self.path / "stopped.json"

    def _stored_config(self) -> dict[str, Any] | None:  # Any: JSON values
        path = self.path / "config.json"
        if not path.exists():
            return None
        config = read_json(path)
        if not isinstance(config, dict):
            raise InputError(f"{path}: expected the configuration of a run, found something else. Give another --logger-folder.")
        return config

    def _check_unused(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--logger-folder {self.path}: expected a folder, found a file.")
        there = sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []
        foreign = [name for name in there if not name.startswith(".") and not name.endswith(JOB_LOGS)]
        if foreign:
            raise InputError(
                f"--logger-folder {self.path}: expected an empty folder or a run with config.json, found {', '.join(foreign[:3])}"
                f"{' and more' if len(foreign) > 3 else ''}. Give another folder."
            )

    def _tensorboard(self) -> SummaryWriter:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # 0.5 s, and only rank 0 needs it

            self._board = SummaryWriter(str(self.path / "tb"), purge_step=self._purge_step)
            self._purge_step = None  # once: a file opened later must not drop what this one holds
        return self._board

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def as_read_back(config: Mapping[str, Any]) -> dict[str, Any]:  # Any: JSON values
    """The configuration as its file will give it back: tuples are lists."""
    value: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    return value


def check_same(path: Path, stored: Mapping[str, Any], config: Mapping[str, Any], free: Collection[str]) -> None:  # Any: JSON values
    """Raises InputError that names each flag which differs though it may not."""
    before, now = dict(flags(stored)), dict(flags(config))
    fixed = sorted({*before, *now} - {*free, PATIENCE})
    differing = [name for name in fixed if before.get(name) != now.get(name) and not (name == MAY_GROW and grown(before, now))]
    if differing:
        changes = "; ".join(f"{label(name)} was {shown(before.get(name))}, now {shown(now.get(name))}" for name in differing)
        hint = " (epochs may only grow)" if MAY_GROW in differing else ""
        raise InputError(
            f"--logger-folder {path}: holds a run with another configuration: {changes}{hint}. "
            "Give the earlier values to continue it, or another folder to start anew."
        )


def flags(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:  # Any: JSON values
    """Each flag and its value; what is no flag but a fact (the data's fingerprint of each split) gets a dotted name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", item) for inner, item in flags(value))
        else:
            yield name, value


def label(name: str) -> str:
    """`--batch-size` for the flag `batch_size`, a fact's dotted name as it is."""
    return name if "." in name else f"--{name.replace('_', '-')}"


def grown(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:  # Any: JSON values
    """Whether the run is to have more epochs than before."""
    old, new = before.get(MAY_GROW), now.get(MAY_GROW)
    return isinstance(old, int) and isinstance(new, int) and new > old


def more_patient(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:  # Any: JSON values
    """Whether the run is to wait longer than before for a better epoch, or always."""
    old, new = before.get(PATIENCE), now.get(PATIENCE)
    return old is not None and (new is None or new > old)


def shown(value: Any) -> str:  # Any: JSON values
    """A flag's value as one would type it."""
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "empty"
    return "not set" if value is None else str(value)


def read_json(path: Path) -> Any:  # Any: what JSON holds
    """The content of one of our files; InputError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found a damaged file ({error}). Repair it, or give another --logger-folder.") from error


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:  # Any: JSON values
    """Each complete line and its record; a damaged one (a process was killed while it wrote) is named in the log and left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            if "step" not in record:
                raise ValueError("no step")
        except (ValueError, TypeError):
            logger.warning("%s: line %d is damaged; it is left out", path, number)
            continue
        yield line, record


def without_nan(value: Any) -> Any:  # Any: JSON values
    """`value` with None for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value
