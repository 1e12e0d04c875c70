"""Runs that outlive their job: SLURM is asked to queue it again after a save, and a run that no longer gets anywhere is not started for ever.

signal -> all ranks save -> rank 0: is the job still running? -> scontrol requeue -> the same job starts again and goes on
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from clips.errors import InputError
from clips.files import write_json

logger = logging.getLogger(__name__)

FILE = "starts.json"
SCONTROL_S = 60.0  # a busy controller answers late


@dataclass(frozen=True)
class RequeueConfig:
    """What a job does about its own end."""

    requeue: bool = False
    """After a signal and the save, have SLURM queue this job again. Not in a chain of array elements, where the next element goes on."""
    max_restarts: int = 3
    """Starts of a SLURM job in a row that make no step; the next one is an error. It guards chains and requeued jobs against going round for ever."""

    def __post_init__(self) -> None:
        if self.max_restarts < 1:
            raise InputError(f"--max-restarts {self.max_restarts}: expected at least 1.")

    def check(self, job: str | None, in_array: bool, in_sweep: bool) -> None:
        """Raises InputError where the job cannot be, or must not be, queued again."""
        if not self.requeue:
            return
        if job is None:
            raise InputError("--requeue: expected a SLURM job (SLURM_JOB_ID is not set). Leave it out; the same command continues a run.")
        if in_array and not in_sweep:
            raise InputError("--requeue: this job is an element of a chain (--array), whose next element goes on. Take one of the two.")


def count_start(folder: Path, step: int, max_restarts: int) -> None:
    """Enters a start at optimiser step `step` into starts.json; InputError after more than `max_restarts` in a row at the same step."""
    path = folder / FILE
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        starts = int(last["starts"]) + 1 if last["step"] == step else 1
    except FileNotFoundError:
        starts = 1
    except (ValueError, TypeError, KeyError):
        logger.warning(f"{path}: damaged; the count of starts begins anew")
        starts = 1
    if starts > max_restarts:
        raise InputError(
            f"--max-restarts {max_restarts}: the last {starts - 1} starts of this run made no step after step {step}. Look at their output for the reason "
            f"(a time limit shorter than a step and a save, too little memory), then remove {path} and submit again."
        )
    write_json(path, {"step": step, "starts": starts})


def after_stop(job: str, requeue: bool) -> None:
    """Queues a saved and stopped job again where --requeue asks for it, and where SLURM preempts it with a grace time: ending well, it would count as done."""
    if requeue or is_preempted(job):
        queue_again(job)


def is_preempted(job: str) -> bool:
    """Whether SLURM is taking the job's nodes for another one and may queue it again; False where nobody can tell."""
    try:
        shown = _scontrol("show", "job", "-o", job)
    except InputError as error:
        logger.info(f"whether job {job} is preempted is not known ({error})")
        return False
    return bool(re.search(r"\bPreemptTime=\d", shown)) and "Requeue=1" in shown.split()


def queue_again(job: str) -> None:
    """Asks SLURM, unless it has cancelled, ended or already requeued the job; InputError where SLURM refuses."""
    state = state_of(job)
    if state != "RUNNING":
        logger.info(f"job {job} is {state}: it is not queued again")
        return
    _scontrol("requeue", job)
    logger.info(f"job {job} is queued again")


def state_of(job: str) -> str:
    """SLURM's word, such as RUNNING, PENDING, COMPLETING, CANCELLED."""
    shown = _scontrol("show", "job", "-o", job)
    match = re.search(r"\bJobState=(\w+)", shown)
    return match[1] if match else "UNKNOWN"


def _scontrol(*words: str) -> str:
    hint = "The run is saved: submit the same job again."
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=SCONTROL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--requeue: scontrol {' '.join(words)}: {error}. {hint}") from error
    if done.returncode:
        raise InputError(f"--requeue: scontrol {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}. {hint}")
    return done.stdout
