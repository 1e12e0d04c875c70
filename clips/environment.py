"""What SLURM and torchrun say about this process: the one place that reads their variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import InputError

MAX_CPUS_OUTSIDE_A_JOB = 8  # a login node or a desk is shared: never take all of it by default


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of one training: ranks are 0 … world_size − 1."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str  # "torchrun", "srun" or "single"
    master_addr: str = "127.0.0.1"
    master_port: int = 29500


def ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Torchrun's variables first; SLURM's only inside a step of several tasks; otherwise a single process.

    SLURM_PROCID also exists in the batch script itself, so only SLURM_STEP_ID means "started by srun": plain
    `python train.py` in an allocation of eight tasks must not wait for seven others.
    """
    if ("RANK" in environ) != ("WORLD_SIZE" in environ):
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in environ else ("WORLD_SIZE", "RANK")
        raise InputError(f"{there} is set but {missing} is not; expected both (torchrun sets them) or neither. Unset {there} or set {missing}.")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not environ.get(name, "0").isdecimal():
            raise InputError(f"{name}={environ[name]}: expected a number, as torchrun sets it. Unset it or set it right.")
    if "RANK" in environ:
        return Ranks(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", 0)),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", 1)),
            launcher="torchrun",
            master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(environ.get("MASTER_PORT", 29500)),
        )
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
        return Ranks(
            rank=int(environ["SLURM_PROCID"]),
            world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environ["SLURM_LOCALID"]),
            local_world_size=int(re.split(r"[(,]", tasks_per_node)[0]),
            launcher="srun",
            master_addr=first_host(nodes),
            master_port=20000 + int(environ["SLURM_JOB_ID"]) % 20000,
        )
    return Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="single")


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `h[0102-0105,0110]` gives `h0102`, `a1,b2` gives `a1`."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if match is None:
        raise InputError(f"SLURM node list {nodelist!r}: expected host names such as n[01-04]. Check SLURM_JOB_NODELIST.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0])


@dataclass(frozen=True)
class Array:
    """A SLURM job array and this job's element of it."""

    element: int
    count: int
    lowest: int
    highest: int


def job_array(environ: Mapping[str, str] = os.environ) -> Array | None:
    """The job array that this process belongs to, or None."""
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
    return Array(*(int(environ[name]) for name in names))


def job_name(environ: Mapping[str, str] = os.environ) -> str | None:
    """What scontrol calls this job: `12_3` for element 3 of array 12, otherwise the job's number; None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def in_job(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM started this process."""
    return "SLURM_JOB_ID" in environ


def cpus_of_rank(place: Ranks) -> int:
    """The cores that this rank may use: srun binds each task to its own, torchrun's processes share the node's."""
    return max(1, allocated_cpus() // (place.local_world_size if place.launcher == "torchrun" else 1))


def allocated_cpus() -> int:
    """The cores that this process may use; at most 8 outside a SLURM job."""
    cpus = len(os.sched_getaffinity(0))
    return cpus if in_job() else min(cpus, MAX_CPUS_OUTSIDE_A_JOB)


@dataclass(frozen=True)
class Allocation:
    """What SLURM's, torchrun's and CUDA's variables say of the job around this process; None where they say nothing."""

    job: str | None = None
    in_step: bool = False  # started by srun, and not the batch script itself
    cpus_per_task: int | None = None  # as asked from sbatch
    srun_cpus_per_task: int | None = None  # what srun will give
    num_nodes: int = 1
    tasks_per_node: int = 1  # the most on any node
    gpus_on_node: int | None = None
    visible_gpus: str | None = None
    end_time_s: float | None = None  # since 1970
    rank: str | None = None
    world_size: str | None = None
    under_torchrun: bool = False
    array: Array | None = None


def allocation(environ: Mapping[str, str] = os.environ) -> Allocation:
    """The job around this process. Raises nothing: a value that is no number counts as not said."""
    in_step = "SLURM_STEP_ID" in environ
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") if in_step else None
    tasks = tasks or environ.get("SLURM_NTASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")  # "4(x2),1"
    return Allocation(
        job=job_name(environ),
        in_step=in_step,
        cpus_per_task=_number(environ, "SLURM_CPUS_PER_TASK"),
        srun_cpus_per_task=_number(environ, "SRUN_CPUS_PER_TASK"),
        num_nodes=_number(environ, "SLURM_STEP_NUM_NODES" if in_step else "SLURM_JOB_NUM_NODES") or 1,
        tasks_per_node=max([int(number) for number in re.findall(r"(?:^|,)(\d+)", tasks)] or [1]),
        gpus_on_node=_number(environ, "SLURM_GPUS_ON_NODE"),
        visible_gpus=environ.get("CUDA_VISIBLE_DEVICES"),
        end_time_s=_number(environ, "SLURM_JOB_END_TIME"),
        rank=environ.get("RANK"),
        world_size=environ.get("WORLD_SIZE"),
        under_torchrun="TORCHELASTIC_RUN_ID" in environ,
        array=job_array(environ),
    )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else None
