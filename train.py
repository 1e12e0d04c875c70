"""Fine-tunes a video transformer on packed clips: python train.py --dataset-home D --logger-folder L --epochs E --model-name M

parse -> build (sources, model, optimiser) -> for each epoch: train, evaluate on val, keep the best, save -> best on test

Clips lie in memory as (B, T, H, W, C) bytes, channels last, from the shard to the patch embedding; nothing permutes or
normalises them on the way.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from clips import command
from clips.clip import ClipSpec
from clips.environment import ranks
from clips.errors import InputError
from clips.mix import hash64
from clips.registry import check_name
from loaders.batch import Batch
from loaders.certificate import CERTIFICATE, Certificate, merge, write_certificate
from loaders.home import Home, open_home
from loaders.plan import Plan
from loaders.sample import AugmentConfig, hflip_chance
from loaders.source import ClipSource
from loaders.stream import Loader, LoaderConfig, default_threads
from models import ModelConfig, build_model, load_trained
from training import checkpoint
from training.distributed import Group, meet, start
from training.evaluation import METRICS, Scores, in_words, metrics_of, prediction_rows, probabilities
from training.meter import Meter
from training.metrics import write_predictions
from training.optimizer import OptimizerConfig, build_optimizer, set_lr
from training.precision import Precision, largest_micro_batch
from training.run_folder import RunFolder
from training.schedule import ScheduleConfig, explain, lr_at
from training.step import fits, gradients, in_parallel

logger = logging.getLogger("train")

# What a resumed run may change: how clips are read and where things lie, nothing that changes the result.
FREE = (
    *("dataset_home", "loader", "threads", "prefetch", "look_ahead", "decode_in", "stage_dir", "max_bad_clips"),
    *("micro_batch", "device", "log_every", "logger_folder"),
)


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tunes a video transformer to tell gesture from nongesture, or any classes apart."""

    logger_folder: Path
    """The run's folder; the same command again continues the run."""
    epochs: int
    """Passes over the training clips; a finished run continues when this grows."""
    data: LoaderConfig
    model: ModelConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 64
    """Clips of one optimiser step over all ranks and accumulation."""
    micro_batch: int | None = None
    """Clips that a rank sees at once; default: on a GPU the most that fit, found once, on a CPU all of its batch."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format of the step; auto: bf16 where the GPU has it, fp16 with a loss scale on older ones, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    seed: int = 0
    """Of the order, the augmentation and dropout, 0 to 2^63 - 1; the new head starts from the same numbers whatever the seed."""
    fraction: float = 1.0
    """Train on this share of the training clips: nested (a smaller share is part of a larger one) and the same for each class."""
    balance: bool = False
    """Epochs with as many clips of every class as the smallest class has, without replacement; the larger classes rotate."""
    best_metric: Literal["loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision"] = "auroc"
    """The metric on val that chooses the best epoch; of equals the earlier."""
    positive: str | None = None
    """The positive class of F1, AUROC and average precision with two classes; default: the last, gesture."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; only these steps wait for the GPU."""
    config: Path | None = None
    """A config.json of an earlier run: its values become the defaults."""

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch-size", self.batch_size), ("log-every", self.log_every), ("micro-batch", self.micro_batch)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: expected at least 1.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: expected 0 to 2^63 - 1.")


@dataclass
class Training:
    """All that a run works with."""

    config: TrainConfig
    group: Group
    folder: RunFolder
    loader: Loader
    val: Loader | None
    model: nn.Module  # transformers' keys, never wrapped
    wrapped: nn.Module  # the same in DistributedDataParallel where there are several ranks
    optimizer: torch.optim.Optimizer
    precision: Precision
    certificate: Certificate
    class_names: tuple[str, ...]
    step: int = 0
    epoch: int = 0  # finished epochs
    best: float | None = None


def main() -> int:
    """Parses, trains, and gives 0 also when the run was finished before."""
    command.show_log(ranks().rank == 0)
    with meet() as others:  # from here on, when one rank fails or dies, all end
        config = parse(sys.argv[1:])
        group = start(config.device, others)
        folder = RunFolder(config.logger_folder, group.is_main)
        others.last_words = folder.stop
        train(config, group, folder)
        group.close()
    return 0


def parse(args: list[str]) -> TrainConfig:
    """The configuration; `--config FILE` fills the defaults."""
    default = None
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config", type=Path)
    path = pre.parse_known_args(args)[0].config
    if path is not None:
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"--config {path}: not readable as JSON ({error}). Give the config.json of a run.") from error
        empty = TrainConfig(Path(), 1, LoaderConfig(Path()), ModelConfig("-"))
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if name not in ("data", "class_names")}
        default = command.with_values(empty, values, str(path))
    return command.parse(TrainConfig, "train.py", "Fine-tunes a video transformer on packed clips.", args, default)


def train(config: TrainConfig, group: Group, folder: RunFolder) -> None:
    """One run from where it stands to its end."""
    home = open_home(config.data.dataset_home, config.data.loader, config.fraction, config.balance)
    if config.positive is not None:
        check_name(home.class_names, config.positive, "--positive")
        if len(home.class_names) > 2:
            raise InputError(f"--positive {config.positive}: with {len(home.class_names)} classes every class counts. Leave it out.")
    identity = identify(config, home)
    state = group.ask_main(lambda: folder.look(identity, FREE))
    if state == "finished":
        logger.info(f"{config.logger_folder}: this run is finished; more --epochs would continue it")
        return
    saved = checkpoint.load_last(config.logger_folder) if state == "resume" else None
    run = build(config, group, folder, home, saved)
    _introduce(run, home)
    folder.begin(identity)
    folder.cut_back(run.step)
    while run.epoch < config.epochs:
        train_epoch(run)
        validate(run)
        _save(run)
    if "test" in home.sources:
        test(run, home.sources["test"])
    folder.finish()
    for loader in (run.loader, run.val):
        if loader is not None:
            loader.close()


def build(config: TrainConfig, group: Group, folder: RunFolder, home: Home, saved: dict[str, Any] | None) -> Training:
    """Model, optimiser and loaders, at their start or as they were saved."""
    class_names = home.class_names
    torch.manual_seed(config.seed)
    model = build_model(config.model, class_names).to(group.device)
    wrapped = in_parallel(model) if group.world_size > 1 else model
    precision = Precision(config.precision, group.device)
    spec = model.spec
    assert isinstance(spec, ClipSpec)
    rank_batch = max(1, config.batch_size // group.world_size)
    whole = Plan(len(home.subset), config.batch_size, rank_batch, config.seed, group.rank, group.world_size, home.labels)
    whole.check_epoch()
    plan = replace(whole, micro_batch=config.micro_batch or _micro_batch(model, whole, precision, group, saved))
    loader = make_loader(config, home.sources["train"], plan, spec, group, home.subset)
    val = make_loader(config, home.sources["val"], plan, spec, group) if "val" in home.sources else None
    certificate = Certificate(len(class_names), group.rank)
    run = Training(config, group, folder, loader, val, model, wrapped, build_optimizer(model, config.optimizer), precision, certificate, class_names)
    if saved:
        _restore(run, saved)
    return run


def make_loader(config: TrainConfig, source: ClipSource, plan: Plan, spec: ClipSpec, group: Group, subset: Sequence[int] | None = None) -> Loader:
    """Over the clips of `subset` in the plan's order, or over all of a split, each once."""
    if subset is None:
        plan = replace(plan, num_clips=len(source.facts), labels=None)
    data = config.data
    threads = data.threads or default_threads()
    how = {"look_ahead": data.look_ahead, "decode_in": data.decode_in, "stage_dir": data.stage_dir, "max_bad_clips": data.max_bad_clips}
    return Loader(source, plan, spec, group.device, threads, data.prefetch, subset, config.augment, **how)  # type: ignore[arg-type]  # names and kinds agree


def train_epoch(run: Training) -> None:
    """One pass over the training clips, logged every `log_every` steps."""
    config, plan = run.config, run.loader.plan
    meter, total = Meter(), torch.zeros(2, device=run.group.device)  # of losses and steps since the last log line
    whole = torch.zeros(2, device=run.group.device)  # the same over the epoch
    run.certificate.begin(run.epoch)
    batches = _certified(run, run.loader.training(run.epoch))
    run.wrapped.train()
    progress = tqdm(total=plan.steps_per_epoch, desc=f"epoch {run.epoch + 1}/{config.epochs}", unit="step", disable=None if run.group.is_main else True)
    for _ in range(plan.steps_per_epoch):
        lr = lr_at(run.step, plan.steps_per_epoch, config.epochs, config.batch_size, config.schedule)
        set_lr(run.optimizer, lr)
        torch.manual_seed(hash64("step", config.seed, run.step, run.group.rank) >> 1)  # dropout's chance is the step's own: a resume needs no saved state
        loss = gradients(run.wrapped, batches, plan.rank_batch // plan.micro_batch, plan.rank_batch, run.precision, meter)
        total += torch.stack([loss, torch.ones_like(loss)])
        grad_norm = run.precision.step(run.optimizer, run.model.parameters(), config.optimizer.clip_grad)
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        meter.step(config.batch_size)
        progress.update()
        if run.step % config.log_every == 0 or run.step % plan.steps_per_epoch == 0:
            loss_sum, num_steps, num_bad = run.group.sum([*total.tolist(), run.certificate.num_bad])
            _check_budget(run, round(num_bad))
            whole += total
            total.zero_()
            wait = max(run.group.gather_objects((meter.longest_wait, run.group.rank)))
            record: dict[str, Any] = {"loss": loss_sum / num_steps, "lr": lr, "grad_norm": grad_norm.item(), "bad_clips": round(num_bad), **meter.report()}
            record |= {"longest_wait_ms": wait[0].ms, "longest_wait": f"{wait[0].stage} {wait[0].file} on rank {wait[1]}"}
            run.folder.log({"step": run.step, "epoch": run.epoch} | {f"train/{name}": value for name, value in record.items()})
            progress.set_postfix(loss=f"{record['loss']:.4f}", clips_per_s=f"{record.get('clips_per_s', 0):.1f}")
    progress.close()
    run.epoch += 1
    loss_sum, num_steps = run.group.sum(whole.tolist())
    fed = run.certificate.finish(run.group.gather_objects(run.certificate.state_dict()))
    counts = dict(zip(run.class_names, fed["class_counts"], strict=True))
    speed = {"loss": loss_sum / num_steps, **meter.report_epoch(), "bad_clips": len(fed["bad"]), "clips": counts}
    run.folder.log({"step": run.step, "epoch": run.epoch} | {f"epoch/{name}": value for name, value in speed.items()})
    logger.info(
        f"epoch {run.epoch}/{config.epochs}: train loss {speed['loss']:.4f}, {speed['clips_per_s']:.1f} clips/s, "
        f"data wait {speed['data_wait_percent']:.1f} % of the step; " + ", ".join(f"{count} {name}" for name, count in counts.items())
    )


def _certified(run: Training, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, each entered into the epoch's certificate as the model takes it; clips that could not be read are named."""
    for batch in batches:
        run.certificate.add(batch.proof, batch.labels, [(clip.position, clip.key) for clip in batch.bad])
        for clip in batch.bad:
            logger.warning(f"bad clip at place {clip.position} of epoch {run.epoch + 1}, weight 0: {clip.reason}")
        yield batch


def _check_budget(run: Training, num_bad: int) -> None:
    """Raises InputError on all ranks once they have more bad clips together than an epoch may have."""
    allowed = run.config.data.max_bad_clips
    if num_bad > allowed:
        raise InputError(f"--max-bad-clips {allowed}: {num_bad} clips of epoch {run.epoch + 1} cannot be read, named above. Mend them or allow more.")


def validate(run: Training) -> None:
    """Metrics on val to the log; the best epoch so far is saved as a transformers folder."""
    if run.val is None:
        metrics: dict[str, Any] = {}
        logger.info("no split val: the last epoch counts as the best")
    else:
        metrics = measure(run, run.model, run.val)[0]
        run.folder.log({"step": run.step, "epoch": run.epoch} | {f"val/{name}": metrics[name] for name in (*METRICS, "confusion", "unread")})
        logger.info("val: " + in_words(metrics))
        if metrics["loss"] is None:
            raise InputError(f"val: {'; '.join(metrics['notes'])} Take a lower --lr; best/ holds the best epoch before, if there was one.")
    value = metrics.get(run.config.best_metric)
    if value is None and run.val is not None:
        logger.info(f"val: {run.config.best_metric} is undefined here ({'; '.join(metrics['notes'])}); the last epoch counts as the best until one has it")
    score = None if value is None else -value if run.config.best_metric == "loss" else value
    if is_better(score, run.best):
        run.best = score
        if run.group.is_main:
            note = {"epoch": run.epoch, "seed": run.config.seed} | {f"val {name}": metrics[name] for name in METRICS if metrics.get(name) is not None}
            run.model.save(run.folder.path / "best", run.class_names, note)  # type: ignore[operator]  # every model of ours has it


def is_better(score: float | None, best: float | None) -> bool:
    """Whether an epoch takes the place of the best before it: of equal scores the earlier stays, any score beats none, and of none the last stays."""
    return best is None or (score is not None and score > best)


def test(run: Training, source: ClipSource) -> None:
    """The best epoch's metrics and predictions on test."""
    run.group.barrier()  # rank 0 has written best/
    model, _ = load_trained(run.folder.path / "best")
    loader = make_loader(run.config, source, run.loader.plan, run.loader.spec, run.group)
    metrics, scores = measure(run, model.to(run.group.device), loader)
    loader.close()
    run.folder.log({"step": run.step, "epoch": run.epoch} | {f"test/{name}": metrics[name] for name in (*METRICS, "confusion", "unread")})
    if run.group.is_main:
        write_predictions(run.folder.path / "predictions-test.csv", prediction_rows(source.facts, "test", scores), run.class_names)
        logger.info("test, best epoch: " + in_words(metrics))


def measure(run: Training, model: nn.Module, loader: Loader) -> tuple[dict[str, Any], Scores]:
    """The split's metrics and scores; clips that could not be read are named and left out."""
    facts = loader.source.facts
    scores = probabilities(model, loader.evaluation(), len(facts), run.precision, run.group, run.config.data.max_bad_clips)
    if run.group.is_main:
        for reason in scores.unread.values():
            logger.warning(f"left out of the evaluation: {reason}")
    return metrics_of(facts, scores, run.class_names, run.config.positive), scores


def identify(config: TrainConfig, home: Home) -> dict[str, Any]:
    """What a run is, as config.json: its flags, its classes and its data, which are the same from npz and from shards."""
    flags = {name: value for name, value in command.flatten(config).items() if name != "config"}
    flags["dataset_home"] = str(config.data.dataset_home.absolute())  # for predict, wherever it is started
    return {**flags, "data": home.fingerprints(), "class_names": list(home.class_names)}


def _introduce(run: Training, home: Home) -> None:
    """What this run is, in the log."""
    config, plan = run.config, run.loader.plan
    lines = home.describe() + run.model.describe()  # type: ignore[operator]  # every model of ours has it
    lines += explain(config.epochs, plan.steps_per_epoch, config.batch_size, config.schedule)
    lines.append(
        f"step: {config.batch_size} clips over {run.group.world_size} ranks, {plan.micro_batch} at once, {run.precision.mode} on {run.group.device}, "
        f"{plan.steps_per_epoch} steps an epoch, flip chance {hflip_chance(config.augment, run.class_names)}"
    )
    lines.append("channels-last: clips stay (B, T, H, W, C) bytes from the shard to the patch embedding, which normalises them")
    for line in lines:
        logger.info(line)


def _micro_batch(model: nn.Module, plan: Plan, precision: Precision, group: Group, saved: dict[str, Any] | None) -> int:
    """All of a rank's step on a CPU; on a GPU the most clips whose step fits in its memory, the least over all ranks, found once."""
    if group.device.type != "cuda":
        return plan.rank_batch
    if saved and saved["gpu"] == torch.cuda.get_device_name(group.device) and plan.rank_batch % saved["micro_batch"] == 0:
        return int(saved["micro_batch"])
    shape = model.spec.video_shape  # type: ignore[union-attr]  # a ClipSpec
    found = largest_micro_batch(lambda size: fits(model, shape, size, precision), plan.rank_batch)  # type: ignore[arg-type]  # likewise
    return min(group.gather_objects(found))


def _save(run: Training) -> None:
    certificate = merge(run.group.gather_objects(run.certificate.state_dict()))
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.precision.state_dict(),
        "step": run.step,
        "epoch": run.epoch,
        "best": run.best,
        "certificate": certificate,
        "micro_batch": run.loader.plan.micro_batch,
        "gpu": torch.cuda.get_device_name(run.group.device) if run.group.device.type == "cuda" else None,  # a micro-batch holds for one kind
    }
    if run.group.is_main:
        checkpoint.save(run.folder.path, run.step, state)
        write_certificate(run.folder.path / CERTIFICATE, certificate)


def _restore(run: Training, saved: dict[str, Any]) -> None:
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.precision.load_state_dict(saved["scaler"])
    run.certificate.load_state_dict(saved["certificate"])
    run.step, run.epoch, run.best = saved["step"], saved["epoch"], saved["best"]
    logger.info(f"continuing after epoch {run.epoch}, step {run.step}")


if __name__ == "__main__":
    sys.exit(command.run(main))
