"""What a trained run says of clips: python predict.py RUN [--split test] for metrics, python predict.py RUN PATHS… --output F for any snippets.

RUN/best -> model -> each clip once, whole frames -> probabilities -> metrics, a CSV file, and for ELAN a text file a source
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from clips import command
from clips.claim import claimed
from clips.environment import allocated_cpus
from clips.errors import InputError
from clips.files import sha256_of
from clips.format import ClipFacts
from clips.manifest import is_packed, read_manifest
from clips.words import counted
from loaders.batch import Batch
from loaders.npz import NpzSource
from loaders.plan import Plan
from loaders.source import ClipSource, open_source
from loaders.stream import Loader, default_threads
from loaders.views import parse_views
from models import load_trained
from models.classifier import ClipClassifier
from training.distributed import Group, choose_device, share_cores
from training.elan import Decision, windows_in, windows_of, with_times, write_elan
from training.evaluation import Scores, in_words, judged_of, metrics_of, prediction_rows, scored
from training.metrics import Prediction, counted_classes, write_predictions
from training.precision import Precision
from training.report import detailed, write_report
from training.threshold import EVEN, read_threshold
from training.unfinished import Unfinished

logger = logging.getLogger("predict")

SAVE_S = 10.0  # at most so much work is lost with a killed process


@dataclass(frozen=True)
class PredictConfig:
    """Metrics and probabilities of a run's best epoch. A killed prediction goes on where it stood: the same command again."""

    run: tyro.conf.Positional[Path]
    """The run's folder, as --logger-folder named it."""
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Unlabelled npz files, or folders with such at any depth; without them a split is taken."""
    split: str | None = None
    """The split to predict; default: test."""
    dataset_home: Path | None = None
    """Shards or snippets; default: those that the run was trained on."""
    output: Path | None = None
    """The CSV file; default for a split: RUN/predictions-SPLIT.csv, for that of another home RUN/predictions-SPLIT-HOME.csv."""
    elan: Path | None = None
    """A folder that gets a tab-delimited file SOURCE.txt of annotations for ELAN from each source, neighbouring positive clips merged.
    Times follow from the running numbers and count from the source's first snippet in any split: check them against one video first."""
    threshold: float | None = None
    """Probability of the positive class from which --elan annotates a clip; default: the run's threshold.json, chosen on val, or 0.5."""
    clip_ms: int | None = None
    """Length of a clip in ms, for --elan: begin and end follow from the running numbers where the data set does not tell them."""
    batch_size: int = 16
    """Clips at once."""
    threads: int | None = None
    """Decoding threads; default: the cores that this process may use, at most 8."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format; auto as in training."""
    views: str = "1x1"
    """Views of a clip whose probabilities are averaged: choices of frames times crops of each, such as 2x3, at as many times the cost."""
    max_bad_clips: int = 0
    """Clips that may be unreadable: they are listed without probabilities, named, and left out of the metrics."""

    def __post_init__(self) -> None:
        if self.paths and (self.split or self.dataset_home):
            raise InputError("--split and --dataset-home: leave them out with paths, whose snippets are unlabelled.")
        if self.paths and self.output is None:
            raise InputError("--output: missing; name the CSV file that the probabilities of these paths go to.")
        if self.elan is not None and self.elan.exists() and not self.elan.is_dir():
            raise InputError(f"--elan {self.elan}: expected a folder, found a file.")
        if self.elan is None and (self.threshold is not None or self.clip_ms is not None):
            raise InputError("--threshold and --clip-ms: only --elan DIR uses them. Add it, or leave them out.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold {self.threshold}: expected 0 … 1.")
        parse_views(self.views)
        for flag, number in (("--batch-size", self.batch_size), ("--clip-ms", self.clip_ms), ("--threads", self.threads)):
            if number is not None and number < 1:
                raise InputError(f"{flag} {number}: expected at least 1.")


@dataclass(frozen=True)
class Run:
    """What a run folder holds for a prediction; `positive` is the index of the positive one of two classes."""

    folder: Path
    dataset_home: Path
    class_names: tuple[str, ...]
    positive_name: str | None

    @property
    def positive(self) -> int | None:
        return counted_classes(self.class_names, self.positive_name)[0] if len(self.class_names) == 2 else None


def main() -> int:
    """Writes the CSV file, prints metrics where labels are known, and gives 0."""
    command.show_log()
    config = command.parse(PredictConfig, "predict.py", "Metrics and probabilities of a trained run.")
    stored = check_there(config)
    model, class_names = load_trained(config.run / "best")
    run = Run(config.run, Path(stored["dataset_home"]), class_names, stored.get("positive"))
    source: ClipSource = NpzSource.of_paths(config.paths, class_names) if config.paths else _split(config, run)  # type: ignore[assignment]  # facts: a list
    if config.paths and model.uses_keypoints:
        logger.warning("the run looks at joints; unlabelled snippets are read without theirs")
    output = config.output or run.folder / f"predictions-{_name(config, run)}.csv"
    with claimed(output.with_name(f".{output.name}.claim"), "writes this file"):
        scores = predict(config, run, model, source, output)
        facts = source.facts if config.elan is None else _timed(config, run, source)
        rows = prediction_rows(facts, "" if config.paths else config.split or "test", scores)
        write_predictions(output, rows, class_names)
        output.with_name(f"{output.name}.part").unlink(missing_ok=True)
    if not config.paths:
        _report(config, run, source, scores)
    if config.elan is not None:
        _annotate(config.elan, rows, _decision(config, run))
    print(f"{counted(len(source.facts), 'clip')} -> {output}")
    return 0


def predict(config: PredictConfig, run: Run, model: ClipClassifier, source: ClipSource, output: Path) -> Scores:
    """Every clip's probabilities: those that an earlier start left beside the output, and the others."""
    group = Group(0, 1, 0, choose_device(config.device, 0), "single")
    share_cores(group.device, allocated_cpus())
    precision = Precision(config.precision, group.device)
    unfinished = Unfinished(output, _identity(run, precision) | {"views": config.views})
    views = parse_views(config.views)
    keys = [(fact.key, stamp) for fact, stamp in zip(source.facts, _stamps(config, run, source), strict=True)]
    done = unfinished.open()
    unread: dict[int, str] = {}
    missing = [number for number, key in enumerate(keys) if key not in done]
    if done:
        logger.info(f"{unfinished.path}: going on; {len(keys) - len(missing)} of {len(keys)} clips are there")
    if missing:
        plan, threads = Plan(len(missing), config.batch_size, config.batch_size, seed=0), config.threads or default_threads()
        how = {"subset": missing, "with_points": model.uses_keypoints, "max_bad_clips": config.max_bad_clips, "sampling": model.sampling}
        loader = Loader(source, plan, model.spec, group.device, threads, **how)  # type: ignore[arg-type]  # names and kinds agree
        progress = tqdm(total=len(keys), initial=len(keys) - len(missing), unit="clip", desc="predict", disable=None)
        try:
            found, unread = _predict(model.to(group.device), loader.evaluation(views), views.count, precision, unfinished, keys, progress)
        finally:
            progress.close()
            loader.close()
        done |= found
    for reason in unread.values():
        logger.warning(f"without probabilities: {reason}")
    unknown = [np.nan] * len(run.class_names)
    return Scores(np.asarray([unknown if number in unread else done[key] for number, key in enumerate(keys)], np.float32), unread)


def _predict(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    num_views: int,
    precision: Precision,
    unfinished: Unfinished,
    keys: Sequence[tuple[str, str]],
    progress: tqdm,
) -> tuple[dict[tuple[str, str], list[float]], dict[int, str]]:
    """Probabilities by key and stamp, the mean over the views, saved as they come, and by number why clips could not be read."""
    found: dict[tuple[str, str], list[float]] = {}
    unread: dict[int, str] = {}
    waiting: list[tuple[Sequence[int], torch.Tensor]] = []  # on the device: only a save waits for it
    seen: dict[int, list[np.ndarray]] = {}  # the views so far of clips that lack some
    saved_s = time.monotonic()

    def save() -> None:
        for numbers, rows in waiting:
            for number, row in zip(numbers, rows.double().cpu().numpy(), strict=True):
                seen.setdefault(number, []).append(row)
        waiting.clear()
        whole = {number: np.mean(rows, axis=0).astype(np.float32).tolist() for number, rows in seen.items() if len(rows) == num_views}
        for number in whole:
            del seen[number]
        ready = {keys[number]: row for number, row in whole.items() if number not in unread}
        unfinished.append((*key, row) for key, row in ready.items())
        found.update(ready)

    try:
        for batch, rows in scored(model, batches, precision):
            reasons = {clip.position: clip.reason for clip in batch.bad}
            unread |= {number: reasons[position] for number, position in zip(batch.number, batch.position, strict=True) if position in reasons}
            waiting.append((batch.number, rows))
            progress.update(len(batch) / num_views)
            if time.monotonic() > saved_s + SAVE_S:
                save()
                saved_s = time.monotonic()
    finally:  # also of an interrupt: what was predicted is kept
        save()
    return found, unread


def _identity(run: Run, precision: Precision) -> dict[str, Any]:  # Any: JSON values
    """What all probabilities depend on."""
    digest = hashlib.sha256()
    for path in sorted((run.folder / "best").iterdir()):
        if path.suffix != ".md":  # the model card says nothing to the model
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return {"model": digest.hexdigest(), "classes": list(run.class_names), "precision": precision.mode}


def _stamps(config: PredictConfig, run: Run, source: ClipSource) -> list[str]:
    """What changes with each clip's file: the shard's sha256 as its manifest says, or size and time of an npz."""
    paths = [source.where(number)[0] for number in range(len(source.facts))]
    home = config.dataset_home or run.dataset_home
    if not config.paths and is_packed(home):
        shards = read_manifest(home).splits[config.split or "test"].shards
        return [{shard.name: shard.tar_sha256 for shard in shards}[path] for path in paths]
    found = [(Path() if config.paths else home) / path for path in paths]
    return [f"{stat.st_size} {stat.st_mtime_ns}" for stat in (path.stat() for path in found)]


def _report(config: PredictConfig, run: Run, source: ClipSource, scores: Scores) -> None:
    """The metrics on stdout; tables and pictures where the CSV file has its default place."""
    judged = judged_of(source.facts, scores, run.class_names, run.positive_name)
    threshold = read_threshold(run.folder, run.positive_name) if run.positive is not None else None
    metrics = detailed(metrics_of(source.facts, scores, run.class_names, run.positive_name), judged, threshold)
    print(f"{config.split or 'test'}: {in_words(metrics)}")
    if config.output is None:
        write_report(run.folder, _name(config, run), judged, f"{run.folder.name}: {_name(config, run)}")


def _decision(config: PredictConfig, run: Run) -> Decision:
    """From which probability on a clip is annotated, said in the log."""
    if run.positive is None:
        logger.info("--elan: each clip is annotated with its most probable class")
        return Decision(run.class_names, None, EVEN)
    stored = read_threshold(run.folder, run.positive_name) if config.threshold is None else None
    value = config.threshold if config.threshold is not None else stored.value if stored else EVEN
    origin = "as asked" if config.threshold is not None else "chosen on val" if stored else "for the run has no threshold.json"
    logger.info(f"--elan: clips are annotated from a probability of {value:.4f} of {run.class_names[run.positive]} on, {origin}")
    return Decision(run.class_names, run.positive, value)


def _timed(config: PredictConfig, run: Run, source: ClipSource) -> list[ClipFacts]:
    """The clips' facts with the times that their annotations get; what that rests on goes to the log."""
    windows = windows_of(source.facts) if config.paths else windows_in(config.dataset_home or run.dataset_home)
    starts = windows.starts()
    if shared := sorted({fact.source for fact in source.facts if fact.source in starts and windows.in_several_splits(fact.source)}):
        names = ", ".join(shared[:3]) + (" and more" if len(shared) > 3 else "")
        logger.warning(f"--elan: {counted(len(shared), 'source')} in several splits, {names}: times count from the first snippet in any of them")
    return with_times(source.facts, windows, config.clip_ms)


def _annotate(folder: Path, rows: Sequence[Prediction], decide: Decision) -> None:
    """The files for ELAN; sources whose clips' times are unknown are named."""
    written = write_elan(folder, rows, decide)
    left_out = sorted({row.source or "" for row in rows} - set(written))
    print(f"{counted(sum(written.values()), 'annotation')} of {counted(len(written), 'source')} -> {folder}")
    if left_out:
        names = ", ".join(left_out[:3]) + (" and more" if len(left_out) > 3 else "")
        hint = "Running numbers must have no gap, of a source in several splits over all of them, and --clip-ms gives the clips' length."
        logger.warning(f"--elan: no file for {counted(len(left_out), 'source')}, {names}: begin and end of their clips are unknown. {hint}")


def check_there(config: PredictConfig) -> Mapping[str, Any]:  # Any: JSON values
    """The run's config.json; InputError that names all that is missing at once."""
    faults, stored = [], {}
    try:
        stored = _run_config(config.run)
    except InputError as error:
        faults.append(str(error))
    faults += [f"{path}: no such file or folder; expected npz." for path in config.paths if not path.exists()]
    if config.dataset_home is not None and not config.dataset_home.is_dir():
        faults.append(f"--dataset-home {config.dataset_home}: no such folder; expected shards or npz snippets.")
    if config.output is not None and (config.output.is_dir() or not config.output.absolute().parent.is_dir()):
        faults.append(f"--output {config.output}: expected a file in a folder that exists.")
    if len(faults) > 1:
        raise InputError(f"{len(faults)} things are missing or wrong:\n" + "\n".join(f"  {fault}" for fault in faults))
    if faults:
        raise InputError(faults[0])
    return stored


def _run_config(run: Path) -> dict[str, Any]:  # Any: JSON values
    if not (run / "config.json").exists():
        found = "it has no config.json" if run.is_dir() else "no such folder"
        hint = " Give the folder above it." if run.resolve().name in ("best", "checkpoints") else " Give what --logger-folder named."
        raise InputError(f"{run}: expected the folder of a run with config.json and best/; {found}.{hint}")
    try:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{run / 'config.json'}: cannot be read ({error}). Restore it, or give another run.") from error
    if not isinstance(config, dict) or "dataset_home" not in config:
        hint = " Give the folder above it." if run.resolve().name == "best" else ""
        raise InputError(f"{run / 'config.json'}: is not that of a run; it names no dataset_home. Give what --logger-folder named.{hint}")
    if not (run / "best").is_dir():
        raise InputError(f"{run}: has no best/ yet; expected a run with at least one finished epoch.")
    return config


def _split(config: PredictConfig, run: Run) -> ClipSource:
    """The split's clips; another home must have the run's classes in the run's order."""
    home = config.dataset_home or run.dataset_home
    source = open_source(home, config.split or "test")
    if source.class_names != run.class_names:
        raise InputError(f"--dataset-home {home}: classes {' '.join(source.class_names)}; the run tells {' '.join(run.class_names)}, in this order.")
    return source


def _name(config: PredictConfig, run: Run) -> str:
    """Of the split's files in the run's folder; another home's or other views' never take the place of the run's own."""
    split = config.split or "test"
    is_own = config.dataset_home is None or config.dataset_home.resolve() == run.dataset_home.resolve()
    home = "" if is_own or config.dataset_home is None else f"-{config.dataset_home.resolve().name}"
    return split + home + (f"-{config.views}" if config.views != "1x1" else "")


if __name__ == "__main__":
    sys.exit(command.run(main))
