"""What a run takes of a cluster: hours an epoch, epochs a job, jobs of the chain, room, time to stage. Every assumption is a number in the text.

clips/s, clips, epochs, hours of the time limit -> plan_lines -> lines for the log
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from clips.errors import InputError
from clips.manifest import is_packed, read_manifest
from clips.words import counted

from . import room
from .rehearsal import duration, megabytes

# Assumptions, none of them measured on your cluster.
LEAD_MINUTES = 5.0  # slurm/train.sbatch: --signal=USR2@300
EARLY_MINUTES = 1.0  # SLURM may send the signal so much earlier than asked (sbatch's manual)
START_MINUTES = 5.0  # Python, weights, the micro-batch's search, compilation, the first batches
EVALUATION_SPEED = 2.0  # clips/s of evaluation over those of training: the forward pass is a third of a step's work, and decoding stays
CHECKPOINT_MINUTES = 10.0  # between saves, as --checkpoint-minutes has it
WRITE_MB_PER_S = 100.0  # of a checkpoint to a busy file server
STAGE_MB_PER_S = 200.0  # from a file server to the node's own disk


@dataclass(frozen=True)
class PlanConfig:
    """How many jobs a run will take."""

    plan: float | None = None
    """Hours of the time limit: says how many jobs the run takes, epochs a job, room and time to stage, and writes no run."""
    clips_per_s: float | None = None
    """Speed to plan with, over all GPUs; default: measured by a few steps here, which is right only on the node that will train."""

    def __post_init__(self) -> None:
        for name, value, unit in (("plan", self.plan, "hours"), ("clips-per-s", self.clips_per_s, "clips a second")):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: expected {unit}, more than 0.")
        if self.clips_per_s is not None and self.plan is None:
            raise InputError("--clips-per-s: is a speed to plan with. Give --plan HOURS too, or leave it out.")


def plan_lines(
    clips_per_s: float,
    epoch_clips: int,
    eval_clips: int,
    epochs: int,
    limit_hours: float,
    lead_minutes: float,
    checkpoint_bytes: int,
    best_bytes: int,
    shards_bytes: int,
    stage_mb_per_s: float | None,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
) -> list[str]:
    """Lines: `epoch_clips` are trained and `eval_clips` evaluated in each epoch; `shards_bytes` is 0 for npz, `stage_mb_per_s` None where nobody measured it.

    Raises InputError for a limit that leaves no time to train.
    """
    epoch_s = seconds_of_epoch(clips_per_s, epoch_clips, eval_clips, checkpoint_bytes, best_bytes, checkpoint_minutes)
    overhead_minutes = START_MINUTES + lead_minutes + EARLY_MINUTES
    job_s = 3600 * limit_hours - 60 * overhead_minutes
    if job_s <= 0:
        raise InputError(f"--plan {limit_hours:g}: start-up and the signal before the end take {overhead_minutes:g} minutes. Give a longer time limit.")
    jobs = epochs * epoch_s / job_s
    links = max(1, math.ceil(jobs - 1e-9))
    save_s = _seconds(checkpoint_bytes, WRITE_MB_PER_S)
    lines = [
        f"{duration(epoch_s)} an epoch: {epoch_clips} clips at {clips_per_s:.3g} clips/s, {eval_clips} evaluated at {EVALUATION_SPEED:g} times that speed, "
        f"a save every {checkpoint_minutes:g} min and at its end at {WRITE_MB_PER_S:g} MB/s",
        f"a job of {limit_hours:g} h trains {duration(job_s)}, {job_s / epoch_s:.1f} epochs: {START_MINUTES:g} min for the start, "
        f"and the signal {lead_minutes:g} min before the end, up to {EARLY_MINUTES:g} min early",
        f"{counted(epochs, 'epoch')} {'take' if epochs > 1 else 'takes'} {duration(epochs * epoch_s)}: {_chain(links, jobs)}",
        f"a checkpoint has {megabytes(checkpoint_bytes)}, best/ {megabytes(best_bytes)}; the run's folder holds up to "
        f"{megabytes(room.most_bytes(checkpoint_bytes, best_bytes))}",
    ]
    if save_s > 60 * lead_minutes / 2:
        lines.append(
            f"a save takes {duration(save_s)} at {WRITE_MB_PER_S:g} MB/s, more than half of the {lead_minutes:g} min before the end: "
            f"submit with --signal=USR2@{60 * math.ceil(2 * save_s / 60)}"
        )
    if shards_bytes:
        speed = f"{stage_mb_per_s:g} MB/s" if stage_mb_per_s else f"{STAGE_MB_PER_S:g} MB/s, which is assumed"
        stage_s = _seconds(shards_bytes, stage_mb_per_s or STAGE_MB_PER_S)
        lines.append(f"--stage-dir copies {megabytes(shards_bytes)} of shards in {duration(stage_s)} at {speed}, while training already runs")
    return [f"plan: {line}" for line in lines]


def seconds_of_epoch(
    clips_per_s: float, epoch_clips: int, eval_clips: int, checkpoint_bytes: int, best_bytes: int, checkpoint_minutes: float = CHECKPOINT_MINUTES
) -> float:
    """Training, evaluation, and the saves in and after it; best/ is counted each time."""
    train_s = epoch_clips / clips_per_s
    saves = 1 + math.floor(train_s / (60 * checkpoint_minutes))
    written_s = saves * _seconds(checkpoint_bytes, WRITE_MB_PER_S) + _seconds(best_bytes, WRITE_MB_PER_S)
    return train_s + eval_clips / (EVALUATION_SPEED * clips_per_s) + written_s


def sizes(model: nn.Module, has_average: bool) -> tuple[int, int]:
    """Bytes of a checkpoint and of best/, for a model as it is frozen."""
    parameters = sum(one.numel() for one in model.parameters())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return room.checkpoint_bytes(parameters, trained, has_average), room.best_bytes(parameters)


def bytes_of_shards(home: Path) -> int:
    """0 for snippets that are not packed."""
    return sum(shard.tar_bytes for split in read_manifest(home).splits.values() for shard in split.shards) if is_packed(home) else 0


def _chain(links: int, jobs: float) -> str:
    if links == 1:
        return f"one job is enough, {100 * jobs:.0f} % of it is used"
    return f"{links} jobs, the last {100 * (jobs - links + 1):.0f} % full: slurm/submit.sh {links} …, or --array=1-{links}%1"


def _seconds(num_bytes: int, mb_per_s: float) -> float:
    return num_bytes / (1e6 * mb_per_s)
