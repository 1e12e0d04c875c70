"""What the facts mean for this job: its cores, ranks, GPUs, limits and time. Each check is a pure function of the facts; doctor_data has those of files.

Facts -> check -> Finding: ok, warn or fail, what was found, and what to do about it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clips.environment import MAX_CPUS_OUTSIDE_A_JOB
from clips.words import counted
from loaders.staging import in_words

from .doctor_facts import Facts

MAX_THREADS = 8  # of a rank, as the loader decides it
MIN_CORES_OF_A_GPU = 4  # a core decodes 125 to 200 clips a second of 16 JPEG frames, a large GPU trains on about 370
MIN_SHM_BYTES = 1 << 30  # NCCL's own advice for the ranks of a node; Docker gives 64 MiB
SPARE_FILES = 512  # for all that is no shard, as the loader reserves them
MIN_MINUTES = 20  # train.sbatch's signal comes 5 to 6 minutes before the end; start-up and a few steps want some more


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's; `fix` is empty where all is well."""

    check: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:4}  {self.check}: {self.found}" + (f": {self.fix}" if self.fix else "")


def cores(facts: Facts) -> Finding:
    """Decoding threads want a core each."""
    here, threads = cores_of_task(facts), threads_of_loader(facts)
    asked = f"--threads {threads}" if facts.asked.threads else f"the loader takes {counted(threads, 'thread')}"
    found = f"a task may use {counted(here, 'core')}; {asked}"
    limit = facts.cgroup_cores
    if limit is not None and threads > math.ceil(limit):
        return Finding("cores", "warn", f"{found}, but the cgroup has {limit:g} cores' time", f"give --threads {max(1, math.floor(limit))}, or ask for more")
    if threads > here:
        return Finding("cores", "warn", found, f"give --threads {here}, or ask sbatch for --cpus-per-task={threads}")
    if facts.gpus.count and facts.asked.device != "cpu" and here < MIN_CORES_OF_A_GPU:
        return Finding("cores", "warn", f"{found}, too few to decode for a GPU", f"ask sbatch for --cpus-per-task={MAX_THREADS}")
    return Finding("cores", "ok", found)


def cores_of_task(facts: Facts) -> int:
    """The cores of one rank: its own inside a step, of the batch script's those that srun will deal out to it."""
    job = facts.allocation
    if job.job is None:
        return min(facts.cores, MAX_CPUS_OUTSIDE_A_JOB)
    if job.in_step:
        return facts.cores
    return min(facts.cores, job.srun_cpus_per_task or job.cpus_per_task or max(1, facts.cores // job.tasks_per_node))


def threads_of_loader(facts: Facts) -> int:
    return facts.asked.threads or min(MAX_THREADS, cores_of_task(facts))


def srun_cores(facts: Facts) -> Finding:
    """Since SLURM 22.05 srun does not take over sbatch's --cpus-per-task: every task has one core, and training waits for its clips."""
    job = facts.allocation
    asked, given = job.cpus_per_task or 1, job.srun_cpus_per_task
    fix = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun"
    if job.job is None or asked == 1:
        return Finding("srun cores", "ok", "no --cpus-per-task to hand on")
    if job.in_step and facts.cores < asked:
        return Finding("srun cores", "fail", f"{asked} cores were asked for each task, this one has {facts.cores}", fix)
    if not job.in_step and given is None:
        return Finding("srun cores", "fail", f"SRUN_CPUS_PER_TASK is not set, and srun then gives each task 1 of its {asked} cores", fix)
    if not job.in_step and given is not None and given < asked:
        return Finding("srun cores", "warn", f"SRUN_CPUS_PER_TASK={given} leaves {asked - given} of a task's {asked} cores idle", fix)
    return Finding("srun cores", "ok", f"each task has the {asked} cores that were asked for")


def ranks(facts: Facts) -> Finding:
    """RANK and WORLD_SIZE are torchrun's; left behind in a job they make every task the same rank of a group that never meets."""
    job = facts.allocation
    there = {"RANK": job.rank, "WORLD_SIZE": job.world_size}
    known = [name for name, value in there.items() if value is not None]
    if len(known) == 1:
        missing = "WORLD_SIZE" if known == ["RANK"] else "RANK"
        return Finding("ranks", "fail", f"{known[0]}={there[known[0]]} without {missing}", f"unset {known[0]}")
    if known and job.job is not None and not job.under_torchrun:
        found = f"RANK={job.rank} and WORLD_SIZE={job.world_size} are set in a SLURM job, though torchrun did not start this"
        return Finding("ranks", "fail", found, "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE before srun")
    if known:
        return Finding("ranks", "ok", f"rank {job.rank} of {job.world_size}, by torchrun")
    tasks = f"{counted(job.tasks_per_node, 'task')} on a node, {counted(job.num_nodes, 'node')}"
    return Finding("ranks", "ok", "no job: a single process" if job.job is None else f"job {job.job}: {tasks}")


def gpus(facts: Facts) -> Finding:
    """One task for each GPU."""
    job, count, tasks = facts.allocation, facts.gpus.count, facts.allocation.tasks_per_node
    named = [name for name in (job.visible_gpus or "").split(",") if name.strip() and name.strip() not in ("NoDevFiles", "-1")]
    held = max(job.gpus_on_node or 0, len(named))
    seen = f"{counted(count, 'GPU')} for {counted(tasks, 'task')}"
    if facts.asked.device == "cpu":
        idle = f"--device cpu leaves {counted(held, 'GPU')} of this job idle"
        return Finding("GPUs", "warn", idle, "leave --device out, or --gres") if job.job and held else Finding("GPUs", "ok", "none is wanted (--device cpu)")
    if not count and held:
        found = f"{counted(held, 'GPU')} should be visible, none can be used ({facts.gpus.error})"
        return Finding("GPUs", "fail", found, "exclude this node (sbatch --exclude) and tell the site; or give --device cpu")
    if not count and facts.asked.device == "cuda":
        return Finding("GPUs", "fail", f"--device cuda: none ({facts.gpus.error})", "ask sbatch for --gres=gpu:1, or leave --device out")
    if not count:
        return Finding("GPUs", "ok", f"none ({facts.gpus.error}): a training here uses the CPU")
    if len(named) > count:
        return Finding("GPUs", "fail", f"CUDA_VISIBLE_DEVICES={job.visible_gpus} names {len(named)}, usable: {count}", "name only GPUs that the job holds")
    if job.job is None:
        return Finding("GPUs", "ok", counted(count, "GPU"))
    each_its_own = job.in_step and count == 1 and (job.gpus_on_node or tasks) >= tasks  # srun --gpus-per-task
    if tasks > count and not each_its_own:
        return Finding("GPUs", "fail", seen, f"ask sbatch for --ntasks-per-node={count}, or for --gres=gpu:{tasks}")
    if tasks < count:
        return Finding("GPUs", "warn", f"{seen}: {count - tasks} idle", f"ask sbatch for --ntasks-per-node={count}, or for --gres=gpu:{tasks}")
    return Finding("GPUs", "ok", seen)


def driver(facts: Facts) -> Finding:
    """Torch's CUDA needs a driver of its major version or newer."""
    known, built = facts.gpus.driver_cuda, facts.torch_cuda
    if facts.torch_version is None:
        return Finding("driver", "fail", "torch is not installed", "run make install, and have slurm/env.sh activate its environment")
    torch = f"torch {facts.torch_version} for " + (f"CUDA {built}" if built else "CPUs")
    if facts.asked.device == "cpu" or known is None:
        return Finding("driver", "ok", f"{torch}; " + ("no NVIDIA driver here" if known is None else "not needed (--device cpu)"))
    found = f"{torch}, the driver knows CUDA {known[0]}.{known[1]}"
    if built is None:
        advice = f"install torch's build for CUDA {known[0]}, or give --device cpu"
        return Finding("driver", "fail", found, advice) if facts.gpus.count else Finding("driver", "ok", f"{found}; no GPU here")
    if int(built.split(".")[0]) > known[0]:
        advice = f"install torch's build for CUDA {known[0]}, or ask the site for a newer driver"
        return Finding("driver", "fail" if facts.gpus.count else "warn", found, advice)
    return Finding("driver", "ok", found)


def shared_memory(facts: Facts) -> Finding:
    """NCCL's ranks of one node talk through /dev/shm; the loader uses memory without a name instead."""
    free, tasks = facts.shm_bytes, facts.allocation.tasks_per_node
    found = "there is none" if free is None else f"{in_words(free)} free"
    if tasks > 1 and facts.gpus.count and (free or 0) < MIN_SHM_BYTES:
        return Finding("/dev/shm", "warn", f"{found} for {tasks} ranks of NCCL", "give the container more (docker --shm-size=1g), or export NCCL_SHM_DISABLE=1")
    return Finding("/dev/shm", "ok", found)


def open_files(facts: Facts) -> Finding:
    """Every rank keeps every shard open; it raises its own limit as far as the hard limit allows."""
    most, shards = facts.max_open_files, facts.shards
    limit = "no limit" if most is None else f"at most {most}"
    if shards is None:
        return Finding("open files", "ok", limit)
    counts = {**shards.counts, "val": shards.counts.get("train", 0)} if facts.asked.fold else shards.counts  # a fold of train, opened once more
    wanted = sum(counts.values())
    found = f"{limit}; each rank opens {counted(wanted, 'shard')}"
    if most is not None and most < wanted + SPARE_FILES:
        advice = f"ask for a hard limit of {wanted + SPARE_FILES} (ulimit -Hn), or pack with a larger --shard-mib"
        return Finding("open files", "fail" if most < wanted else "warn", found, advice)
    return Finding("open files", "ok", found)


def time_left(facts: Facts) -> Finding:
    """The signal that asks a run to save comes some minutes before the end."""
    end = facts.allocation.end_time_s
    if end is None:
        return Finding("time limit", "ok", "none is known here")
    minutes = (end - facts.now_s) / 60
    found = f"{minutes / 60:.1f} h left" if minutes >= 120 else f"{minutes:.0f} min left"
    if minutes < MIN_MINUTES:
        advice = f"ask sbatch for a --time of {MIN_MINUTES} minutes and more, or for a shorter --signal"
        return Finding("time limit", "warn", f"{found}, of which train.sbatch's --signal=USR2@300 takes up to 6", advice)
    return Finding("time limit", "ok", found)
