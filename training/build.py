"""What train.py trains: its flags, and all that a run works with, built from them. Only train.py imports this; it joins the rooms as train.py does.

TrainConfig -> build: plan, model, optimiser, loaders, what is kept and written -> Training
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from clips import command
from clips.errors import InputError
from clips.words import counted
from loaders.certificate import Certificate, merge, write_certificate
from loaders.folds import parse_fold
from loaders.home import Home
from loaders.joints import joints_kept
from loaders.plan import Plan
from loaders.sample import AugmentConfig, hflip_chance
from loaders.source import ClipSource
from loaders.stream import Loader, LoaderConfig, default_threads
from loaders.views import parse_views
from models import ModelConfig, build_model
from models.classifier import ClipClassifier
from models.costs import Cost, estimate, mfu, needs_checkpointing, peak_flops

from .checkpoint import KeepConfig
from .distributed import Group
from .ema import Ema
from .evaluation import EvaluationConfig
from .journal import Journal, JournalConfig
from .judge import Judge
from .mixing import MixConfig, Mixing, balanced_weights
from .optimizer import OptimizerConfig, build_optimizer, rates_in_words
from .planner import PlanConfig
from .precision import Precision
from .progress import Progress
from .recipe import RecipeConfig, departures, used
from .rehearsal import RehearsalConfig
from .requeue import RequeueConfig
from .run_folder import RunFolder
from .schedule import ScheduleConfig, explain
from .signals import Wishes
from .state import RunState
from .step import choose_micro_batch, in_parallel
from .stopping import has_stalled
from .sweep import SweepConfig
from .watch import Watch

logger = logging.getLogger(__name__)

# Flags that say where others come from, what is tried instead of a run, and what its job does.
NO_PART_OF_A_RUN = ("config", "dry_run", "overfit_batch", "plan", "clips_per_s", "sweep", "line", "requeue", "max_restarts")


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
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)
    planning: PlanConfig = field(default_factory=PlanConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    again: RequeueConfig = field(default_factory=RequeueConfig)
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
    fold: str | None = None
    """I/K, such as 2/5: hold out the clips of train whose source falls in fold I of K, in the place of val; sources are dealt to folds by their clips."""
    config: Path | None = None
    """A config.json of an earlier run: its values become the defaults."""

    def __post_init__(self) -> None:
        if self.planning.plan is not None and self.rehearsal.is_asked:
            raise InputError("--plan: expected alone, without --dry-run and --overfit-batch. Take one of them.")
        for name, value in (("epochs", self.epochs), ("batch-size", self.batch_size), ("micro-batch", self.micro_batch)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: expected at least 1.")
        parse_views(self.judge.views)
        if self.fold is not None:
            parse_fold(self.fold)
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
    judge: Judge
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
        judge=Judge(config.judge, folder, group, progress, precision, home.class_names, config.data.max_bad_clips, wishes.poll),
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
    how: dict[str, Any] = {"look_ahead": data.look_ahead, "decode_in": data.decode_in, "stage_dir": data.stage_dir}
    how |= {"max_bad_clips": data.max_bad_clips, "hw_decoder_load": data.hw_decoder_load}
    threads = data.threads or default_threads()
    return Loader(source, plan, model.spec, group.device, threads, data.prefetch, subset, *asked, sampling=model.sampling, **how)


def identify(config: TrainConfig, home: Home) -> dict[str, Any]:
    """What a run is, as config.json: its flags, its classes and its data, which are the same from npz and from shards."""
    flags = {name: value for name, value in command.flatten(config).items() if name not in NO_PART_OF_A_RUN}
    flags["dataset_home"] = str(config.data.dataset_home.absolute())  # for predict, wherever it is started
    return {**flags, "data": home.fingerprints(), "class_names": list(home.class_names)}


def introduce(run: Training, home: Home) -> None:
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
        f"step: {config.batch_size} clips over {counted(run.group.world_size, 'rank')}, {plan.micro_batch} at once, "
        f"{run.precision.mode} on {run.group.device}, {plan.steps_per_epoch} steps an epoch, flip chance {hflip_chance(config.augment, run.class_names)}"
    )
    facts, asked = run.loader.source.facts, min(spec.frames, run.loader.source.stored.frames)
    short = [facts[number].frames_valid for number in home.subset if facts[number].frames_valid < asked]
    if short:
        found = f"fewer valid frames than the {asked} asked, the fewest {min(short)}"
        lines.append(f"frames: {len(short)} of {len(home.subset)} training clips have {found}: theirs come several times, in order")
    for line in lines:
        logger.info(line)


def plain_clips(config: TrainConfig) -> TrainConfig:
    """Without what keeps a model from learning clips by heart; mixing is left to the loop."""
    augment = replace(config.augment, colour=0.0, strength=0.0, erasing=0.0)
    model = replace(config.model, drop_path=0.0, keypoints_dropout=0.0)
    return replace(config, augment=augment, model=model, recipe=replace(config.recipe, repeats=1, ema=0.0))
