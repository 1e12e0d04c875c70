"""Which of several runs is best, by val alone: python -m training compare RUN….

read -> groups that differ in seed or fold alone -> ranked by val -> a table, JSON, curves; test is told of the best group only
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tyro

from clips.errors import InputError
from clips.files import write_json
from clips.words import counted

from .metrics import METRICS
from .run_folder import FREE, flags, label, read_json, read_lines, shown

logger = logging.getLogger(__name__)

IN_A_GROUP = ("seed", "config", *FREE)  # what may differ inside a group
HOMES = "dataset_home"  # free, but frames of another quality may lie there: told where it differs
LESS_IS_BETTER = ("loss",)
DIGITS = 4  # of a metric
MOST_FOLDERS = 8  # named in a row

Metric = Literal["loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision"]


@dataclass(frozen=True)
class CompareConfig:
    """Ranks runs by val: a row for each group of runs that differ in their seed or held out fold alone, mean ± standard deviation over its runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The runs' folders, as --logger-folder named them."""
    metric: Metric | None = None
    """What on val decides; default: the runs' --best-metric. It is taken at each run's best epoch."""
    plot: Path | None = None
    """A PNG with the curves of all runs."""
    json: Path | None = None
    """A file for the same as JSON."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("compare: no run given; expected the folders of one or more runs.")
        for flag, path in (("--plot", self.plot), ("--json", self.json)):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise InputError(f"{flag} {path}: expected a file in a folder that exists.")


@dataclass(frozen=True)
class Run:
    """One run folder: its configuration, its lines of metrics, and whether it has all its epochs, or why not."""

    folder: Path
    config: Mapping[str, Any]  # Any: JSON values
    lines: Sequence[Mapping[str, Any]]
    is_finished: bool
    reason: str

    @property
    def epochs(self) -> list[Mapping[str, Any]]:
        """The lines of val, an epoch each."""
        return [line for line in self.lines if any(name.startswith("val/") for name in line)]

    @property
    def best(self) -> Mapping[str, Any] | None:
        """Val's line of the epoch that the run took as its best; None without val."""
        name = f"val/{self.config.get('best_metric', 'auroc')}"
        known = [line for line in self.epochs if line.get(name) is not None]
        sign = 1 if name.removeprefix("val/") in LESS_IS_BETTER else -1
        if known:
            return min(known, key=lambda line: (sign * line[name], line.get("val/loss") or 0.0))  # of equals the lower loss, then the earlier
        return self.epochs[-1] if self.epochs else None

    @property
    def test(self) -> Mapping[str, Any] | None:
        """Test's line of a finished run."""
        found = [line for line in self.lines if any(name.startswith("test/") for name in line)]
        return found[-1] if found and self.is_finished else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in seed or fold alone; `settings` is what tells them from the other groups."""

    settings: str
    runs: Sequence[Run]

    @property
    def counted(self) -> Sequence[Run]:
        """The finished runs; where there is none, all."""
        return [run for run in self.runs if run.is_finished] or self.runs

    @property
    def is_finished(self) -> bool:
        return self.counted[0].is_finished

    def values(self, metric: str) -> list[float]:
        """Val's metric at each counted run's best epoch."""
        found = [(run.best or {}).get(f"val/{metric}") for run in self.counted]
        return [value for value in found if value is not None]

    def notes(self) -> Iterator[str]:
        for run in self.runs:
            if not run.is_finished:
                left_out = ", left out of the mean" if self.is_finished else ""
                yield f"{run.folder} is not finished (epoch {len(run.epochs)} of {run.config.get('epochs')}{run.reason}){left_out}"
        seeds = [(run.config.get("seed"), run.config.get("fold")) for run in self.counted]
        if twice := sorted({str(seed[0]) for seed in seeds if seeds.count(seed) > 1}):
            yield f"of the same seed ({', '.join(twice)}) there is more than one run"
        homes = sorted({str(run.config.get(HOMES)) for run in self.runs})
        if len(homes) > 1:
            yield f"same clips from {len(homes)} homes, maybe of another quality: {', '.join(homes)}"


def compare(config: CompareConfig) -> int:
    """0 when the table is printed."""
    runs = [read_run(folder) for folder in dict.fromkeys(config.runs)]
    metric = config.metric or _common_metric(runs)
    groups = ranked(groups_of(runs), metric)
    report = [_as_dict(place, group, metric) for place, group in enumerate(groups)]
    print(table(groups, metric))
    if config.json is not None:
        write_json(config.json, {"metric": f"val/{metric}", "groups": report})
    if config.plot is not None:
        from .curves import draw_curves  # matplotlib: half a second

        draw_curves(config.plot, groups, metric)
    return 0


def read_run(folder: Path) -> Run:
    """Raises InputError for a folder that is no run."""
    path = folder / "config.json"
    if not path.is_file():
        hint = " Give the folder above it." if folder.resolve().name == "best" else ""
        raise InputError(f"{folder}: expected the folder of a run, with config.json; found {'none in it' if folder.is_dir() else 'no such folder'}.{hint}")
    stored = read_json(path)
    if not isinstance(stored, dict) or "epochs" not in stored:
        hint = " Give the folder above it." if folder.resolve().name == "best" else ""
        raise InputError(f"{path}: is not the configuration of a run; it names no epochs.{hint}")
    log = folder / "metrics.jsonl"
    lines = [record for _, record in read_lines(log)] if log.exists() else []
    stopped = folder / "stopped.json"
    reason = f", stopped: {read_json(stopped).get('reason')}" if stopped.exists() else ""
    return Run(folder, stored, lines, (folder / "done").exists(), reason)


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Runs of one configuration but for the free flags together, in the order given."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(json.dumps(_fixed(run), sort_keys=True), []).append(run)
    fixed = [_fixed(group[0]) for group in members.values()]
    names = sorted({name for one in fixed for name in one})
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in fixed}) > 1]
    spelled = [", ".join(_typed(name, one.get(name)) for name in differing) for one in fixed]
    return [Group(settings or "the same", group) for settings, group in zip(spelled, members.values(), strict=True)]


def _fixed(run: Run) -> dict[str, Any]:  # Any: JSON values
    """The run's flags and facts, without what may differ in a group; the folds of one cross-validation are one, each with clips of its own."""
    fixed = {name: value for name, value in flags(run.config) if name not in IN_A_GROUP}
    if fold := fixed.get("fold"):
        fixed = {name: value for name, value in fixed.items() if name not in ("data.train", "data.val")} | {"fold": f"I/{fold.partition('/')[2]}"}
    return fixed


def _typed(name: str, value: Any) -> str:  # Any: a JSON value
    """A flag as one would type it; of a fingerprint (data.train) its first letters."""
    if isinstance(value, bool):
        return label(name) if value else label(f"no_{name}")
    return f"{label(name)} {shown(value)[:8] if name.startswith('data.') else shown(value)}"


def _common_metric(runs: Sequence[Run]) -> str:
    found = {str(run.config.get("best_metric", "auroc")) for run in runs}
    if len(found) > 1:
        raise InputError(f"compare: the runs chose their best epochs by {', '.join(sorted(found))}. Say with --metric by which they are ranked.")
    return found.pop()


def ranked(groups: Sequence[Group], metric: str) -> list[Group]:
    """The best by val first; those without a finished run after all others, those without val last; of equals the earlier given."""
    sign = 1 if metric in LESS_IS_BETTER else -1

    def rank(group: Group) -> tuple[bool, bool, float]:
        values = group.values(metric)
        return not values, not group.is_finished, sign * statistics.fmean(values) if values else 0.0

    return sorted(groups, key=rank)


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; of one value no deviation, of none nothing."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def table(groups: Sequence[Group], metric: str) -> str:
    """The groups, best first, then the best one's test and what is to be known."""
    words = metric.replace("_", " ")
    rows = [("", f"val {words}", "runs", "best epochs", "folders", "settings")]
    above = common_folder([run.folder for group in groups for run in group.runs])
    for place, group in enumerate(groups, 1):
        epochs = ", ".join(str(run.best["epoch"]) if run.best else "-" for run in group.counted)
        runs = f"{len(group.counted)}" + ("" if group.is_finished else " unfinished")
        folders = [str(run.folder.relative_to(above) if above else run.folder) for run in group.counted]
        named = ", ".join(folders[:MOST_FOLDERS]) + (f" and {len(folders) - MOST_FOLDERS} more" if len(folders) > MOST_FOLDERS else "")
        rows.append((f"{place}.", spelled(group.values(metric)), runs, epochs, named, group.settings))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    within = f"; folders in {above}" if above else ""
    lines = [f"val {words} at each run's best epoch, mean ± standard deviation over the runs of a row{within}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [*_ties(groups, metric), *_test_in_words(groups[0], metric)]
    lines += [f"note on {place}.: {note}" for place, group in enumerate(groups, 1) for note in group.notes()]
    return "\n".join(lines)


def common_folder(folders: Sequence[Path]) -> Path | None:
    """The deepest folder that all of these lie in, to be named once; None where there is none but the present one."""
    if len({folder.is_absolute() for folder in folders}) > 1:
        return None
    above = Path(os.path.commonpath([folder.parent for folder in folders]))
    return above if above.name else None


def _ties(groups: Sequence[Group], metric: str) -> Iterator[str]:
    """Neighbours of one value, to the digits that are shown: their order says nothing."""
    means = [(group.is_finished, mean_std(group.values(metric))[0]) for group in groups]
    for place, ((one_finished, one), (other_finished, other)) in enumerate(pairwise(means), 1):
        if one is not None and other is not None and one_finished == other_finished and f"{one:.{DIGITS}f}" == f"{other:.{DIGITS}f}":
            how = "equal" if one == other else f"equal to {DIGITS} digits"
            kept = "; the test is that of the one given first" if place == 1 and one == other else ""
            yield f"{place}. and {place + 1}. tie: val {metric.replace('_', ' ')} is {how}{kept}"


def spelled(values: Sequence[float]) -> str:
    """`0.9123 ± 0.0045`."""
    mean, deviation = mean_std(values)
    if mean is None:
        return "-"
    return f"{mean:.{DIGITS}f}" + (f" ± {deviation:.{DIGITS}f}" if deviation is not None else "")


def _test_values(group: Group) -> dict[str, list[float]]:
    """Test's metrics of the counted runs that have them."""
    lines = [run.test for run in group.counted if run.test]
    found = {name: [line[f"test/{name}"] for line in lines if line.get(f"test/{name}") is not None] for name in (*METRICS, "f1_at_threshold")}
    return {name: values for name, values in found.items() if values}


def _test_in_words(group: Group, metric: str) -> list[str]:
    """A line a metric."""
    found = _test_values(group)
    if not group.values(metric):
        return ["no test shown: without val there is no best group"]
    if not found:
        return ["test of 1.: none yet"]
    num_runs = max(map(len, found.values()))
    width = max(len(name) for name in found)
    of_all = f"{num_runs} of its {len(group.counted)} runs" if num_runs < len(group.counted) else counted(num_runs, "run")
    return [f"test of 1., {of_all}:", *(f"    {name.replace('_', ' ').ljust(width)}  {spelled(values)}" for name, values in found.items())]


def _as_dict(place: int, group: Group, metric: str) -> dict[str, Any]:  # Any: JSON values
    """A group as JSON; test's values only of the best."""
    mean, deviation = mean_std(group.values(metric))
    runs = [{"folder": str(run.folder), "seed": run.config.get("seed"), "is_finished": run.is_finished, "val": _val_of(run)} for run in group.runs]
    found: dict[str, Any] = {"rank": place + 1, "settings": group.settings, "mean": mean, "std": deviation, "n": len(group.values(metric)), "runs": runs}
    if place == 0 and mean is not None:
        found["test"] = {name: dict(zip(("mean", "std"), mean_std(values), strict=True)) for name, values in _test_values(group).items()}
    return {**found, "notes": list(group.notes())}


def _val_of(run: Run) -> dict[str, Any]:  # Any: JSON values
    best = run.best or {}
    return {"epoch": best.get("epoch")} | {name: best.get(f"val/{name}") for name in METRICS}
