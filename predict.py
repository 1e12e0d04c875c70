"""What a trained run says of clips: python predict.py RUN [--split test] for metrics, python predict.py RUN PATHS… --output F for any snippets.

RUN/best -> model -> each clip once, whole frames -> probabilities -> metrics and a CSV file
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from clips import command
from clips.environment import allocated_cpus
from clips.errors import InputError
from loaders.npz import NpzSource
from loaders.plan import Plan
from loaders.source import ClipSource, open_source
from loaders.stream import Loader, default_threads
from models import load_trained
from training.distributed import Group, choose_device, share_cores
from training.evaluation import in_words, metrics_of, prediction_rows, probabilities
from training.metrics import write_predictions
from training.precision import Precision

logger = logging.getLogger("predict")


@dataclass(frozen=True)
class PredictConfig:
    """Metrics and probabilities of a run's best epoch."""

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
    batch_size: int = 16
    """Clips at once."""
    threads: int | None = None
    """Decoding threads; default: the cores that this process may use, at most 8."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format; auto as in training."""
    max_bad_clips: int = 0
    """Clips that may be unreadable: they are listed without probabilities, named, and left out of the metrics."""


def main() -> int:
    """Writes the CSV file, prints metrics where labels are known, and gives 0."""
    command.show_log()
    config = command.parse(PredictConfig, "predict.py", "Metrics and probabilities of a trained run.")
    stored = _run_config(config.run)
    _check(config)
    model, class_names = load_trained(config.run / "best")
    source = NpzSource.of_paths(config.paths, class_names) if config.paths else _split(config, stored, class_names)
    output = config.output or _default_output(config, stored)
    group = Group(0, 1, 0, choose_device(config.device, 0), "single")
    share_cores(group.device, allocated_cpus())
    plan = Plan(len(source.facts), config.batch_size, config.batch_size, seed=0)
    threads, bad = config.threads or default_threads(), config.max_bad_clips
    loader = Loader(source, plan, model.spec, group.device, threads, max_bad_clips=bad)  # type: ignore[arg-type]  # a ClipSpec
    batches = tqdm(loader.evaluation(), total=-(-len(source.facts) // config.batch_size), unit="batch", desc="predict", disable=None)
    scores = probabilities(model.to(group.device), batches, len(source.facts), Precision(config.precision, group.device), group, bad)
    loader.close()
    for reason in scores.unread.values():
        logger.warning(f"without probabilities: {reason}")
    write_predictions(output, prediction_rows(source.facts, "" if config.paths else config.split or "test", scores), class_names)
    if not config.paths:
        metrics = metrics_of(source.facts, scores, class_names, stored.get("positive"))
        print(f"{config.split or 'test'}: {in_words(metrics)}")
    print(f"{len(source.facts)} clips -> {output}")
    return 0


def _check(config: PredictConfig) -> None:
    if config.paths and (config.split or config.dataset_home):
        raise InputError("--split and --dataset-home: leave them out with paths, whose snippets are unlabelled.")
    if config.paths and config.output is None:
        raise InputError("--output: missing; name the CSV file that the probabilities of these paths go to.")
    if config.output is not None and (config.output.is_dir() or not config.output.absolute().parent.is_dir()):
        raise InputError(f"--output {config.output}: expected a file in a folder that exists.")
    if config.batch_size < 1:
        raise InputError(f"--batch-size {config.batch_size}: expected at least 1.")


def _run_config(run: Path) -> dict[str, Any]:  # Any: JSON values
    try:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{run}: expected the folder of a run with config.json and best/ ({error}). Give what --logger-folder named.") from error
    if not isinstance(config, dict) or "dataset_home" not in config:
        hint = " Give the folder above it." if run.resolve().name == "best" else ""
        raise InputError(f"{run / 'config.json'}: is not that of a run; it names no dataset_home. Give what --logger-folder named.{hint}")
    if not (run / "best").is_dir():
        raise InputError(f"{run}: has no best/ yet; expected a run with at least one finished epoch.")
    return config


def _split(config: PredictConfig, stored: dict[str, Any], class_names: tuple[str, ...]) -> ClipSource:
    """The split's clips; another home must have the run's classes in the run's order."""
    home = config.dataset_home or Path(stored["dataset_home"])
    source = open_source(home, config.split or "test")
    if source.class_names != class_names:
        raise InputError(f"--dataset-home {home}: classes {' '.join(source.class_names)}; the run tells {' '.join(class_names)}, in this order.")
    return source


def _default_output(config: PredictConfig, stored: dict[str, Any]) -> Path:
    """In the run's folder; another home's predictions never take the place of the run's own."""
    split = config.split or "test"
    if config.dataset_home is None or config.dataset_home.resolve() == Path(stored["dataset_home"]).resolve():
        return config.run / f"predictions-{split}.csv"
    return config.run / f"predictions-{split}-{config.dataset_home.resolve().name}.csv"


if __name__ == "__main__":
    sys.exit(command.run(main))
