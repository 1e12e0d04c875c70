"""Fine-tunes a video transformer on packed clips: python train.py --dataset-home D --logger-folder L --epochs E --model-name M

parse -> build (sources, model, optimiser) -> for each epoch: train, evaluate on val, keep the best, save -> best on test

Clips lie in memory as (B, T, H, W, C) bytes, channels last, from the shard to the patch embedding; nothing permutes or
normalises them on the way.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from clips import command
from clips.environment import ranks
from clips.errors import InputError
from clips.mix import hash64
from loaders.batch import Batch
from loaders.certificate import Certificate, merge, write_certificate
from loaders.home import Home, open_home
from loaders.joints import joints_kept
from loaders.plan import Plan
from loaders.sample import AugmentConfig, hflip_chance
from loaders.source import ClipSource
from loaders.stream import Loader, LoaderConfig, default_threads
from loaders.views import ONE_VIEW, Views, parse_views
from models import ModelConfig, build_model, load_trained
from models.classifier import ClipClassifier
from models.costs import Cost, estimate, mfu, needs_checkpointing, peak_flops
from training import checkpoint
from training.checkpoint import KeepConfig
from training.distributed import Group, meet, start
from training.ema import Ema
from training.evaluation import EvaluationConfig, Scores, in_words, judged_of, metrics_of, prediction_rows, probabilities
from training.journal import Journal, JournalConfig
from training.meter import Meter
from training.metrics import METRICS
from training.mixing import MixConfig, Mixing, balanced_weights
from training.optimizer import OptimizerConfig, build_optimizer, rates_in_words, set_lr
from training.precision import Precision
from training.progress import Progress
from training.recipe import RecipeConfig, choose, departures, used, words
from training.report import report
from training.run_folder import FREE, RunFolder
from training.schedule import ScheduleConfig, explain, lr_at
from training.signals import StopAsked, Wishes
from training.state import RunState
from training.step import choose_micro_batch, gradients, in_parallel
from training.stopping import has_stalled
from training.threshold import best_threshold, write_threshold
from training.watch import Watch

logger = logging.getLogger("train")


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
    mix: MixConfig = field(default_factory=MixConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    judge: EvaluationConfig = field(default_factory=EvaluationConfig)
    writing: JournalConfig = field(default_factory=JournalConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
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
    config: Path | None = None
    """A config.json of an earlier run: its values become the defaults."""

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch-size", self.batch_size), ("micro-batch", self.micro_batch)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: expected at least 1.")
        parse_views(self.judge.views)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: expected 0 to 2^63 - 1.")
        if self.balance and self.mix.class_weights != "none":
            raise InputError("--class-weights: --balance makes the classes equal already. Leave one of them out.")


@dataclass
class Training:
    """All that a run works with."""

    config: TrainConfig
    group: Group
    folder: RunFolder
    loader: Loader
    val: Loader | None
    model: ClipClassifier  # transformers' keys, never wrapped
    wrapped: nn.Module  # the same in DistributedDataParallel where there are several ranks
    optimizer: torch.optim.Optimizer
    precision: Precision
    certificate: Certificate
    class_names: tuple[str, ...]
    mixing: Mixing
    class_weights: torch.Tensor | None  # float32 (K,)
    ema: Ema | None
    wishes: Wishes
    progress: Progress
    journal: Journal
    state: RunState
    cost: Cost

    def averaged(self) -> AbstractContextManager[None]:
        """The model has its averaged weights inside, where there is an average."""
        return self.ema.in_place() if self.ema else nullcontext()

    @property
    def is_done(self) -> bool:
        """Whether every epoch is trained and evaluated, or --patience has run out."""
        progress = self.progress
        stalled = has_stalled(progress.evaluated, progress.best_epoch, self.config.recipe.patience)
        return progress.evaluated == progress.trained and (progress.trained >= self.config.epochs or stalled)


def main() -> int:
    """Parses, trains, and gives 0 also when the run was finished before."""
    command.show_log(ranks().rank == 0)
    with meet() as others:  # from here on, when one rank fails or dies, all end
        config = parse(sys.argv[1:])
        group = start(config.device, others)
        folder = RunFolder(config.logger_folder, group.is_main)
        others.last_words = folder.stop
        others.leaves_sigterm = True  # to `Wishes`, which saves first
        train(config, group, folder)
        group.close()
    return 0


def parse(args: list[str]) -> TrainConfig:
    """The configuration: the user's flags before the recipe's before those of `--config FILE`; of a FILE's recipe its values stand in the file."""
    default = None
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config", type=Path)
    pre.add_argument("--recipe")
    pre.add_argument("--model-name", "--model_name")
    known = pre.parse_known_args(args)[0]
    recipe = words(choose(known.recipe, known.model_name)) if known.recipe or known.config is None else []
    if known.config is not None:
        empty = TrainConfig(Path(), 1, LoaderConfig(Path()), ModelConfig("-"))
        default = command.with_values(empty, command.read_values(known.config, ("data", "class_names")), str(known.config))
    return command.parse(TrainConfig, "train.py", "Fine-tunes a video transformer on packed clips.", [*recipe, *args], default)


def train(config: TrainConfig, group: Group, folder: RunFolder) -> None:
    """One run from where it stands to its end."""
    home = open_home(config.data.dataset_home, config.data.loader, config.fraction, config.balance)
    config.judge.check(home.class_names)
    identity = identify(config, home)
    state = group.ask_main(lambda: folder.look(identity, FREE))
    if state == "finished":
        logger.info(f"{config.logger_folder}: this run is finished; more --epochs would continue it")
        return
    saved = checkpoint.load_last(config.logger_folder) if state == "resume" else None
    with Wishes(group, 60 * config.keep.checkpoint_minutes) as wishes:
        run = build(config, group, folder, home, wishes, saved)
        _introduce(run, home)
        folder.begin(identity)
        folder.cut_back(run.progress.step, saved["num_lines"] if saved else None)
        try:
            _all_epochs(run)
            if "test" in home.sources:
                test(run, home.sources["test"])
        except StopAsked as asked:
            run.state.save()
            folder.stop(reason := f"{asked}; saved at step {run.progress.step}")
            logger.info(f"{reason}; the same command continues")
            return
    folder.finish()
    if group.is_main and not config.keep.keep_optimizer:
        checkpoint.slim(config.logger_folder, ("optimizer",))
    for loader in filter(None, (run.loader, run.val)):
        loader.close()


def _all_epochs(run: Training) -> None:
    while not run.is_done:
        if run.progress.trained == run.progress.evaluated:
            train_epoch(run)
        validate(run)
        run.state.save()
    if run.progress.trained < run.config.epochs:
        logger.info(f"--patience {run.config.recipe.patience}: no better {run.config.judge.best_metric} since epoch {run.progress.best_epoch}; the run ends")


def build(config: TrainConfig, group: Group, folder: RunFolder, home: Home, wishes: Wishes, saved: dict[str, Any] | None) -> Training:
    """Model, optimiser and loaders, at their start or as they were saved."""
    num_classes, repeats = len(home.class_names), config.recipe.repeats
    rank_batch = max(1, config.batch_size // group.world_size)
    whole = Plan(len(home.subset), config.batch_size, rank_batch, config.seed, group.rank, group.world_size, home.labels, repeats)
    whole.check_epoch()
    mixing = Mixing(config.mix, num_classes, config.batch_size, config.seed, repeats)
    mixing.check(rank_batch)
    torch.manual_seed(config.seed)
    model = build_model(config.model, home.class_names, home.sources["train"].stored).to(group.device)
    if config.recipe.head_prior:
        model.set_head_prior(home.class_counts)
    precision = Precision(config.precision, group.device)
    numbers: Literal["fp32", "bf16"] = "fp32" if precision.mode == "fp32" else "bf16"
    make_room = partial(model.checkpoint_activations, True) if config.model.activation_checkpointing == "auto" else None
    micro_batch = config.micro_batch or choose_micro_batch(model, model.spec.video_shape, rank_batch, mixing.unit, precision, group, saved, make_room)
    mixing.check(micro_batch)
    if config.micro_batch and make_room and group.device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(group.device).total_memory
        model.checkpoint_activations(needs_checkpointing(model, micro_batch, numbers, memory_bytes))
    plan = replace(whole, micro_batch=micro_batch)
    progress, certificate, watched = Progress(), Certificate(num_classes, group.rank), Watch(group.device, precision.mode != "fp16")
    cost = estimate(model, None, micro_batch, numbers)
    peak = peak_flops(torch.cuda.get_device_name(group.device)) if group.device.type == "cuda" else None
    rate = partial(mfu, cost=cost, peak=peak)
    optimizer = build_optimizer(model, config.optimizer, model.layer_of, model.num_layers)
    ema = Ema(model, config.recipe.ema) if config.recipe.ema else None
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": precision} | ({"ema": ema} if ema else {})
    run = Training(
        config=config,
        group=group,
        folder=folder,
        loader=make_loader(config, home.sources["train"], plan, model, group, home.subset),
        val=make_loader(config, home.sources["val"], plan, model, group) if "val" in home.sources else None,
        model=model,
        wrapped=in_parallel(model) if group.world_size > 1 else model,
        optimizer=optimizer,
        precision=precision,
        certificate=certificate,
        class_names=home.class_names,
        mixing=mixing,
        class_weights=torch.tensor(balanced_weights(home.class_counts), device=group.device) if config.mix.class_weights == "balanced" else None,
        ema=ema,
        wishes=wishes,
        progress=progress,
        journal=Journal(folder, group, progress, certificate, watched, home.class_names, config.data.max_bad_clips, config.writing.max_skipped, rate),
        state=RunState(folder, group, progress, wishes, parts, certificate, merge, write_certificate, watched, micro_batch),
        cost=cost,
    )
    if saved:
        run.state.restore(saved)
    return run


def make_loader(config: TrainConfig, source: ClipSource, plan: Plan, model: ClipClassifier, group: Group, subset: Sequence[int] | None = None) -> Loader:
    """Over the clips of `subset` in the plan's order, or over all of a split, each once."""
    if subset is None:
        plan = replace(plan, num_clips=len(source.facts), labels=None, repeats=1)
    data, asked = config.data, (config.augment, model.uses_keypoints)
    how = {"look_ahead": data.look_ahead, "decode_in": data.decode_in, "stage_dir": data.stage_dir, "max_bad_clips": data.max_bad_clips}
    threads = data.threads or default_threads()
    return Loader(source, plan, model.spec, group.device, threads, data.prefetch, subset, *asked, sampling=model.sampling, **how)  # type: ignore[arg-type]


def train_epoch(run: Training) -> None:
    """The epoch under way, from where it stands, logged every `log_every` steps."""
    config, plan, progress, epoch = run.config, run.loader.plan, run.progress, run.progress.trained
    run.certificate.begin(epoch, progress.consumed)
    batches = run.journal.fed(run.loader.training(epoch, progress.consumed))
    mix, meter = partial(run.mixing, epoch=epoch), Meter()
    run.wrapped.train()
    first = progress.consumed // plan.batch_size
    bar = tqdm(total=plan.steps_per_epoch, initial=first, desc=f"epoch {epoch + 1}/{config.epochs}", unit="step", disable=None if run.group.is_main else True)
    for number in range(first, plan.steps_per_epoch):
        lr = lr_at(progress.step, plan.steps_per_epoch, config.epochs, config.batch_size // plan.repeats, config.schedule)
        set_lr(run.optimizer, lr)
        torch.manual_seed(hash64("step", config.seed, progress.step, run.group.rank) >> 1)  # dropout's chance is the step's own: a resume needs no saved state
        loss = gradients(run.wrapped, batches, plan.rank_batch // plan.micro_batch, plan.rank_batch, run.precision, meter, mix, run.class_weights)
        grad_norm = run.precision.step(run.optimizer, run.model.parameters(), config.optimizer.clip_grad)
        run.optimizer.zero_grad(set_to_none=True)
        if run.ema:
            run.ema.update()
        run.journal.step(loss, grad_norm, config.batch_size)
        meter.step(config.batch_size)
        bar.update()
        is_last = number == plan.steps_per_epoch - 1
        if progress.step % config.writing.log_every == 0 or is_last:
            record = run.journal.write_steps(lr, meter)
            bar.set_postfix(loss=record["loss"], clips_per_s=record.get("clips_per_s"))
        if run.wishes.poll() and not is_last:
            run.state.save()
    bar.close()
    run.journal.end_epoch(config.epochs, meter)


def validate(run: Training) -> None:
    """Metrics on val to the log; the best epoch so far is saved as a transformers folder."""
    progress, epoch = run.progress, run.progress.trained
    if run.val is None:
        metrics: dict[str, Any] = {}
        logger.info("no split val: the last epoch counts as the best")
    else:
        with run.averaged():
            metrics, scores = measure(run, run.model, run.val)
        run.folder.log({"step": progress.step, "epoch": epoch} | {f"val/{name}": metrics[name] for name in (*METRICS, "confusion", "unread")})
        logger.info("val: " + in_words(metrics))
        if metrics["loss"] is None:
            raise InputError(f"val: {'; '.join(metrics['notes'])} Take a lower --lr; best/ holds the best epoch before, if there was one.")
    value = metrics.get(run.config.judge.best_metric)
    if value is None and run.val is not None:
        logger.info(f"val: {run.config.judge.best_metric} is undefined ({'; '.join(metrics['notes'])}); the last epoch counts as the best until one has it")
    is_best = progress.score(None if value is None else -value if run.config.judge.best_metric == "loss" else value, epoch)
    if is_best and run.group.is_main:
        note = {"epoch": epoch, "seed": run.config.seed} | {f"val {name}": metrics[name] for name in METRICS if metrics.get(name) is not None}
        with run.averaged():
            run.model.save(run.folder.path / "best", run.class_names, note)
        if run.val is not None:
            judged = judged_of(run.val.source.facts, scores, run.class_names, run.config.judge.positive)
            write_threshold(run.folder.path, best_threshold(judged, epoch))


def test(run: Training, source: ClipSource) -> None:
    """The best epoch's metrics and predictions on test."""
    run.group.barrier()  # rank 0 has written best/
    model, _ = load_trained(run.folder.path / "best")
    loader = make_loader(run.config, source, run.loader.plan, model, run.group)
    metrics, scores = measure(run, model.to(run.group.device), loader, parse_views(run.config.judge.views))
    loader.close()
    if run.group.is_main:
        judged = judged_of(source.facts, scores, run.class_names, run.config.judge.positive)
        report(run.folder, "test", run.progress.step, run.progress.trained, judged, metrics, prediction_rows(source.facts, "test", scores))


def measure(run: Training, model: nn.Module, loader: Loader, views: Views = ONE_VIEW) -> tuple[dict[str, Any], Scores]:
    """The split's metrics and scores; clips that could not be read are named and left out."""
    facts = loader.source.facts
    scores = probabilities(model, _in_rounds(run, loader, views), len(facts), run.precision, run.group, run.config.data.max_bad_clips, views.count)
    if run.group.is_main:
        for reason in scores.unread.values():
            logger.warning(f"left out of the evaluation: {reason}")
    return metrics_of(facts, scores, run.class_names, run.config.judge.positive), scores


def _in_rounds(run: Training, loader: Loader, views: Views) -> Iterator[Batch]:
    """This rank's batches of an evaluation; every rank asks for signals equally often, also one with fewer batches."""
    batches = loader.evaluation(views)
    for _ in range(loader.plan.evaluation_rounds * views.count):
        run.wishes.poll()
        batch = next(batches, None)
        if batch is not None:
            yield batch


def identify(config: TrainConfig, home: Home) -> dict[str, Any]:
    """What a run is, as config.json: its flags, its classes and its data, which are the same from npz and from shards."""
    flags = {name: value for name, value in command.flatten(config).items() if name != "config"}
    flags["dataset_home"] = str(config.data.dataset_home.absolute())  # for predict, wherever it is started
    return {**flags, "data": home.fingerprints(), "class_names": list(home.class_names)}


def _introduce(run: Training, home: Home) -> None:
    """What this run is, in the log."""
    config, plan, spec = run.config, run.loader.plan, run.model.spec
    lines = home.describe() + run.model.describe()
    lines += [f"recipe: {line}" for line in (config.recipe.recipe or "plain", *departures(used(command.flatten(config))))]
    different = config.batch_size // plan.repeats
    lines += explain(config.epochs, plan.steps_per_epoch, different, config.schedule)
    lines.append(f"learning rate: at the peak {rates_in_words(run.optimizer, config.schedule.lr * different / 256)}")
    kept = joints_kept(run.loader.source, home.subset, config.augment, config.seed, (spec.height, spec.width)) if run.group.is_main else None
    if kept is not None:
        lines.append(f"augmentation: crops and erased boxes keep {100 * kept:.0f} % of the joints")
    lines.append(run.cost.describe())
    lines.append(
        f"step: {config.batch_size} clips over {run.group.world_size} ranks, {plan.micro_batch} at once, {run.precision.mode} on {run.group.device}, "
        f"{plan.steps_per_epoch} steps an epoch, flip chance {hflip_chance(config.augment, run.class_names)}"
    )
    for line in lines:
        logger.info(line)


if __name__ == "__main__":
    sys.exit(command.run(main))
