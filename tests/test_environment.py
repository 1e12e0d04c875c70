"""Who started this process, as one of how many: torchrun, srun, or nobody."""

from __future__ import annotations

import os

import pytest

from clips import environment
from clips.environment import Array, Ranks, first_host, job_array, ranks
from clips.errors import InputError

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "h[0102-0105,0110]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "h[0103-0104]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "1234"}
SINGLE = Ranks(0, 1, 0, 1, "single")
BATCH_SCRIPT = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")} | {"SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, SINGLE),
        (TORCHRUN, Ranks(3, 4, 1, 2, "torchrun", "n1", 1234)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1, "torchrun")),
        (STEP, Ranks(5, 8, 1, 4, "srun", "h0103", 20000 + 123456 % 20000)),
        (STEP | TORCHRUN, Ranks(3, 4, 1, 2, "torchrun", "n1", 1234)),  # torchrun inside a step wins
        (BATCH_SCRIPT, SINGLE),  # SLURM_PROCID is there, but nobody started eight of us
        (BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "8"}, SINGLE),  # only a step's id tells a step
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, SINGLE),  # srun --pty bash
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, Ranks(5, 8, 1, 4, "srun", "h0102", 20000 + 123456 % 20000)),
    ],
)
def test_the_launcher_is_recognised(environ: dict[str, str], expected: Ranks) -> None:
    assert ranks(environ) == expected


@pytest.mark.parametrize(("there", "missing"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_torchruns_variables_is_an_error(there: str, missing: str) -> None:
    with pytest.raises(InputError, match=f"{there} is set but {missing} is not"):
        ranks(STEP | {there: "1"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("h[0102-0105,0110]", "h0102"),
        ("a1,b2", "a1"),
        ("single", "single"),
        ("n[7]", "n7"),
        ("gpu[3,5],cpu1", "gpu3"),
        ("a,b[1-2]", "a"),
        ("n[01-04]-ib.site.org", "n01-ib.site.org"),
        ("rack[1-2]node[05-08]", "rack1node05"),  # several dimensions
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_an_empty_node_list_is_an_error() -> None:
    with pytest.raises(InputError, match="expected host names"):
        first_host("")


def test_a_job_array_is_known_by_its_variables() -> None:
    element = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "5"}
    assert job_array(element) == Array(element=5, count=2, lowest=3, highest=5)
    assert job_array(STEP) is None and job_array({}) is None


def test_a_shared_machine_is_never_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert environment.allocated_cpus() == 8
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert environment.allocated_cpus() == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert environment.allocated_cpus() == 1
