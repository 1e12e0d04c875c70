"""Fine-tunes a video transformer on packed clips: python train.py --dataset-home D --logger-folder L --epochs E --model-name M

parse -> build (sources, model, optimiser) -> for each epoch: train, evaluate on val, keep the best, save -> best on test

Clips lie in memory as (B, T, H, W, C) bytes, channels last, from the shard to the patch embedding; nothing permutes or
normalises them on the way.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from clips import command
from clips.environment import in_job, job_array, job_name, ranks
from clips.mix import hash64
from loaders.batch import Batch
from loaders.home import Home, open_home
from loaders.source import ClipSource
from loaders.stream import Loader, LoaderConfig
from loaders.views import ONE_VIEW, Views, parse_views
from models import ModelConfig, load_trained
from training import checkpoint
from training.alone import alone
from training.build import TrainConfig, Training, build, identify, introduce, make_loader, plain_clips
from training.distributed import Group, meet, start
from training.evaluation import Scores
from training.meter import Meter
from training.optimizer import set_lr
from training.planner import LEAD_MINUTES, bytes_of_shards, plan_lines, sizes
from training.recipe import with_recipe
from training.rehearsal import STEPS, check_both, learn_by_heart, needs, scratch_folder, timed_steps, told_right
from training.requeue import after_stop, count_start
from training.run_folder import FREE, RunFolder
from training.schedule import BASE_BATCH_SIZE, lr_at
from training.signals import StopAsked, Wishes
from training.state import check_all_read
from training.step import gradients
from training.sweep import with_line
from training.threshold import write_threshold

logger = logging.getLogger("train")


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
    args = with_line(args, job_array())
    default = None
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config", type=Path)
    path = pre.parse_known_args(args)[0].config
    if path is not None:
        empty = TrainConfig(Path(), 1, LoaderConfig(Path()), ModelConfig("-"))
        default = command.with_values(empty, command.read_values(path, ("data", "class_names")), str(path))
    return command.parse(TrainConfig, "train.py", "Fine-tunes a video transformer on packed clips.", with_recipe(args, default is None), default)


def train(config: TrainConfig, group: Group, folder: RunFolder) -> None:
    """One run from where it stands to its end, or what --dry-run and --overfit-batch try of it."""
    home = open_home(config.data.dataset_home, config.data.loader, config.fraction, config.balance, config.fold)
    config.judge.check(home.class_names)
    config.again.check(job_name(), job_array() is not None, config.sweep.sweep is not None)
    identity, finished = identify(config, home), f"{config.logger_folder}: this run is finished; more --epochs would continue it"
    if config.rehearsal.is_asked or config.planning.plan is not None:
        if config.rehearsal.dry_run:
            group.ask_main(lambda: folder.look(identity, FREE))  # another run's folder shows before it queues
        rehearse(config, group, home)
        return
    if group.ask_main(lambda: folder.look(identity, FREE)) == "finished":
        logger.info(finished)
        return
    with alone(config.logger_folder, group):
        state = group.ask_main(lambda: folder.look(identity, FREE))  # again: another training may have gone on meanwhile
        if state == "finished":
            logger.info(finished)
            return
        saved = checkpoint.load_last(config.logger_folder) if state == "resume" else None
        check_all_read(group, config.logger_folder, saved)
        was_stopped = go_on(config, group, folder, home, identity, saved)
    if was_stopped and in_job():
        group.ask_main(lambda: after_stop(str(job_name()), config.again.requeue))


def go_on(config: TrainConfig, group: Group, folder: RunFolder, home: Home, identity: dict[str, Any], saved: dict[str, Any] | None) -> bool:
    """The rest of a run, until its end or until a signal asks to stop; whether it was a signal."""
    with Wishes(group, 60 * config.keep.checkpoint_minutes) as wishes:
        run = build(config, group, folder, home, wishes, saved)
        introduce(run, home)
        folder.begin(identity)
        if in_job():
            group.ask_main(lambda: count_start(folder.path, run.progress.step, config.again.max_restarts))
        folder.cut_back(run.progress.step, saved["num_lines"] if saved else None)
        try:
            _all_epochs(run)
            if "test" in home.sources and config.judge.evaluate_test:
                test(run, home.sources["test"])
        except StopAsked as asked:
            run.state.save()
            folder.stop(reason := f"{asked}; saved at step {run.progress.step}")
            logger.info(f"{reason}; the same command continues")
            return True
    folder.finish()
    if group.is_main and not config.keep.keep_optimizer:
        checkpoint.slim(config.logger_folder, ("optimizer",))
    for loader in filter(None, (run.loader, run.val)):
        loader.close()
    return False


def _all_epochs(run: Training) -> None:
    if run.progress.is_at_best:  # a kill may have come between this checkpoint and best/
        keep_best(run)
    while not run.is_done:
        if run.progress.trained == run.progress.evaluated:
            train_epoch(run)
        validate(run)
        run.state.save()
        if run.progress.is_at_best:
            keep_best(run)
    if run.progress.trained < run.config.epochs:
        logger.info(f"--patience {run.config.recipe.patience}: no better {run.config.judge.best_metric} since epoch {run.progress.best_epoch}; the run ends")
    logger.info(f"best/ is of {run.progress.best_in_words(run.config.judge.best_metric)}")


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
        loss, grad_norm = train_step(run, lr, batches, meter, mix)
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


def train_step(
    run: Training, lr: float, batches: Iterator[Batch], meter: Meter, mix: Callable[[Batch], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimiser step on the next micro-batches; its loss and its gradients' norm before clipping, both still on the device."""
    config, plan = run.config, run.loader.plan
    set_lr(run.optimizer, lr)
    torch.manual_seed(hash64("step", config.seed, run.progress.step, run.group.rank) >> 1)  # dropout's chance is the step's own: a resume needs no saved state
    loss = gradients(run.wrapped, batches, plan.rank_batch // plan.micro_batch, plan.rank_batch, run.precision, meter, mix, run.class_weights)
    grad_norm = run.precision.step(run.optimizer, run.model.parameters(), config.optimizer.clip_grad)
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update(grad_norm.isfinite())  # what was skipped does not count
    return loss, grad_norm


def validate(run: Training) -> None:
    """Metrics on val to the log, and into the progress, which knows the best epoch so far."""
    if run.val is None:
        run.judge.score((), {}, None)
        return
    with run.averaged():
        metrics, scores = measure(run, run.model, run.val)
    run.judge.score(run.val.source.facts, metrics, scores)


def keep_best(run: Training) -> None:
    """best/ and threshold.json of the best epoch, whose weights the model has. After its checkpoint: the next start makes good a kill between."""
    progress = run.progress
    if run.group.is_main:
        note = {"epoch": progress.best_epoch, "seed": run.config.seed} | {f"val {name}": value for name, value in progress.best_metrics.items()}
        with run.averaged():
            run.model.save(run.folder.path / "best", run.class_names, note)
        write_threshold(run.folder.path, progress.best_threshold)


def test(run: Training, source: ClipSource) -> None:
    """The best epoch's metrics and predictions on test."""
    run.group.barrier()  # rank 0 has written best/
    model, _ = load_trained(run.folder.path / "best")
    loader = make_loader(run.config, source, run.loader.plan, model, run.group)
    metrics, scores = measure(run, model.to(run.group.device), loader, parse_views(run.config.judge.views))
    loader.close()
    if run.group.is_main:
        run.judge.report("test", source.facts, metrics, scores)


def measure(run: Training, model: nn.Module, loader: Loader, views: Views = ONE_VIEW) -> tuple[dict[str, Any], Scores]:
    """The split's metrics and scores."""
    return run.judge.measure(model, loader.source.facts, loader.evaluation(views), loader.plan.evaluation_rounds, views.count)


def rehearse(config: TrainConfig, group: Group, home: Home) -> None:
    """--dry-run or --overfit-batch, in a folder that is then removed."""
    with scratch_folder(config.logger_folder, group) as scratch:
        folder = RunFolder(scratch, group.is_main)
        by_heart = config.rehearsal.overfit_batch
        run = build(plain_clips(config) if by_heart else config, group, folder, home, Wishes(group, math.inf), None)
        introduce(run, home)
        if config.planning.plan is not None:
            plan_jobs(run, config.planning.plan)
        elif by_heart:
            overfit(run, by_heart)
        else:
            dry_run(run, home)
        for loader in filter(None, (run.loader, run.val)):
            loader.close()


def dry_run(run: Training, home: Home) -> None:
    """Five steps, a batch of every other split, a checkpoint and best/ written and read back, and what a run takes."""
    config, plan, path = run.config, run.loader.plan, run.folder.path
    step_s = step_seconds(run)
    run.state.save()
    if run.group.is_main:
        run.model.save(path / "best", run.class_names)
        checkpoint.load_last(path)
    run.group.barrier()
    model = load_trained(path / "best")[0].to(run.group.device)
    for split in [split for split in home.sources if split != "train"]:
        loader = make_loader(config, home.sources[split], plan, model, run.group)
        _, num_clips = told_right(model, islice(loader.evaluation(), 1), run.precision, run.group)
        loader.close()
        logger.info(f"dry run: {split}: a batch of {num_clips} clips evaluated by the model that was written and read back")
    for line in run.group.ask_main(lambda: needs(step_s, plan.steps_per_epoch, config.epochs, path / "checkpoints", path / "best", config.logger_folder)):
        logger.info(line)


def step_seconds(run: Training) -> float:
    """Seconds of a step, by the first five of a run."""
    config, plan, meter = run.config, run.loader.plan, Meter()
    batches, mix = run.loader.training(0), partial(run.mixing, epoch=0)
    lr = lr_at(0, plan.steps_per_epoch, config.epochs, config.batch_size // plan.repeats, config.schedule)
    return timed_steps(lambda: train_step(run, lr, batches, meter, mix)[0], min(STEPS, plan.steps_per_epoch))


def plan_jobs(run: Training, hours: float) -> None:
    """--plan: what the run takes of jobs with this time limit; five steps tell the speed unless --clips-per-s does."""
    config, plan = run.config, run.loader.plan
    clips_per_s = config.planning.clips_per_s or config.batch_size / step_seconds(run)
    epoch_clips, eval_clips = plan.steps_per_epoch * config.batch_size, len(run.val.source.facts) if run.val else 0
    written = sizes(run.model, run.ema is not None)
    shards_bytes, minutes = bytes_of_shards(config.data.dataset_home), config.keep.checkpoint_minutes
    for line in plan_lines(clips_per_s, epoch_clips, eval_clips, config.epochs, hours, LEAD_MINUTES, *written, shards_bytes, None, minutes):
        logger.info(line)


def overfit(run: Training, num_steps: int) -> None:
    """The first batch alone, over and over, at the peak rate."""
    plan, group, meter = run.loader.plan, run.group, Meter()
    batches = list(islice(run.loader.training(0), plan.rank_batch // plan.micro_batch))
    lr = run.config.schedule.lr * plan.batch_size / BASE_BATCH_SIZE
    check_both(batches, group)
    run.wrapped.train()
    learn_by_heart(lambda: train_step(run, lr, iter(batches), meter)[0], lambda: told_right(run.model, batches, run.precision, group), num_steps, lr, group)


if __name__ == "__main__":
    sys.exit(command.run(main))
