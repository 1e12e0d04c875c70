"""Group against the arithmetic it promises: alone, and with two real processes over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clips.errors import InputError
from training.distributed import choose_device, meet, start

ROOT = Path(__file__).parents[1]
CHILD = """
import json, sys, warnings
from training.distributed import meet, start
warnings.simplefilter("error")
with meet() as others:
    group = start("cpu", others)
    answers = {
        "rank": group.rank, "world_size": group.world_size, "local_rank": group.local_rank, "is_main": group.is_main,
        "launcher": group.launcher, "device": str(group.device),
        "gathered": group.gather_objects({"keys": ["x"] * group.rank}),
        "broadcast": group.broadcast_object(["from", group.rank]),
        "sum": group.sum([0.1, 2.0**53, float(group.rank)]),
        "empty": group.sum([]),
    }
    group.close()
    group.close()
with open(f"{sys.argv[1]}/{group.rank}.json", "w") as file:
    json.dump(answers, file)
"""
FAILING = """
import os, signal, sys
from clips import command
from clips.errors import InputError
from training.distributed import meet, start

def main():
    with meet() as others:
        group = start("cpu", others)
        group.barrier()
        if group.rank == 1 and sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if group.rank == 1:
            raise InputError("clip x: cut short.")
        group.sum([1.0])

sys.exit(command.run(main))
"""


def run_ranks(num_ranks: int, program: str, *arguments: str) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank of a program."""
    port, children = free_port(), []
    for rank in range(num_ranks):
        place = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environ = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, "-c", program, *arguments]
        children.append(subprocess.Popen(command, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    try:
        said = [child.communicate(timeout=60)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, words) for child, words in zip(children, said, strict=True)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes saw, in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    assert run_ranks(2, CHILD, str(folder)) == [(0, ""), (0, "")]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_find_each_other(answers: list[dict]) -> None:
    assert [answer["rank"] for answer in answers] == [0, 1]
    assert [answer["local_rank"] for answer in answers] == [0, 1]
    assert [answer["is_main"] for answer in answers] == [True, False]
    assert all(answer["world_size"] == 2 and answer["launcher"] == "torchrun" and answer["device"] == "cpu" for answer in answers)


def test_objects_arrive_in_rank_order_on_every_rank(answers: list[dict]) -> None:
    assert all(answer["gathered"] == [{"keys": []}, {"keys": ["x"]}] for answer in answers)


def test_rank_0_is_the_one_that_is_broadcast(answers: list[dict]) -> None:
    assert all(answer["broadcast"] == ["from", 0] for answer in answers)


def test_sums_are_exact_beyond_fp32(answers: list[dict]) -> None:
    assert all(answer["sum"] == [0.2, 2.0**54, 1.0] for answer in answers)
    assert all(answer["empty"] == [] for answer in answers)


def test_a_killed_rank_is_one_line_on_the_ranks_that_wait_for_it_in_a_sum() -> None:
    ends = run_ranks(3, FAILING, "killed")
    assert ends[1] == (-signal.SIGKILL, "")
    for rank in (0, 2):
        code, said = ends[rank]
        assert code == 2 and re.fullmatch(rf"error: rank 1 of 3 ended: killed.* Rank {rank} ends too\.\n", said)


def test_a_bad_clip_on_one_rank_is_one_line_on_each() -> None:
    assert run_ranks(2, FAILING, "bad clip") == [(2, "error: rank 1 of 2 ended: clip x: cut short. Rank 0 ends too.\n"), (2, "error: clip x: cut short.\n")]


def test_half_of_torchruns_variables_are_named_at_once() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {"RANK": "0"}
    done = subprocess.run([sys.executable, "train.py", "--help"], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: RANK is set but WORLD_SIZE is not; expected both (torchrun sets them) or neither. Unset RANK or set WORLD_SIZE.\n"


def test_one_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    place_rank(monkeypatch, None, 1, 0)
    with meet() as others:
        group = start("cpu", others)
    assert not dist.is_initialized()
    assert (group.rank, group.world_size, group.is_main, group.launcher) == (0, 1, True, "single")
    assert group.gather_objects("a") == ["a"]
    assert group.broadcast_object("a") == "a"
    assert group.sum([1, 2.5]) == [1.0, 2.5]
    group.barrier()
    group.close()


def test_a_rank_that_finds_nobody_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    place_rank(monkeypatch, 1, 2, port)
    with pytest.raises(InputError, match=rf"rank 1 of 2 .*127\.0\.0\.1:{port} within 1 s.*MASTER_ADDR"):
        meet(timeout_s=1)


def test_rank_0_does_not_wait_forever_for_a_missing_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    place_rank(monkeypatch, 0, 2, free_port())
    with pytest.raises(InputError, match=r"rank 0 of 2 .* within 1 s"):
        meet(timeout_s=1)


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place_rank(monkeypatch, 0, 2, taken.getsockname()[1])
        with pytest.raises(InputError, match=rf"{taken.getsockname()[1]}.*MASTER_PORT"):
            meet(timeout_s=1)


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda"):
        choose_device("cuda", 0)
    with pytest.raises(InputError, match="--device tpu"):
        choose_device("tpu", 0)


@pytest.mark.parametrize(("num_gpus", "local_rank", "index"), [(4, 0, 0), (4, 3, 3), (1, 3, 0)])
def test_each_rank_takes_the_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch, num_gpus: int, local_rank: int, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert choose_device("auto", local_rank) == torch.device("cuda", index)
    assert choose_device("cpu", local_rank) == torch.device("cpu")


def place_rank(monkeypatch: pytest.MonkeyPatch, rank: int | None, world_size: int, port: int) -> None:
    """Sets torchrun's variables; with rank None there are none."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name in [*place, "SLURM_STEP_ID"]:
        monkeypatch.delenv(name, raising=False)
        if rank is not None and name in place:
            monkeypatch.setenv(name, str(place[name]))


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
