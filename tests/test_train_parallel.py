"""Compiling, several ranks and averaged weights together: the same numbers as alone, under plain transformers' keys."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import train
from convert.pack import PackConfig, pack
from models import ModelConfig, build_model
from tests.making import write_home
from tests.making_models import CLASSES, FAMILIES, clips, plain_model, write_checkpoint
from training.distributed import Group
from training.ema import Ema
from training.run_folder import RunFolder
from training.step import in_parallel

COUNTS = {"train": {"nongesture": 9, "gesture": 7}, "val": {"nongesture": 3, "gesture": 2}}
ROOT = Path(train.__file__).parent
# Nothing that draws by rank; SGD, because AdamW makes full steps of gradients that are rounding noise. Four steps an epoch, two micro-batches a rank.
FLAGS = (
    *("--batch-size", "4", "--micro-batch", "1", "--epochs", "2", "--log-every", "1", "--device", "cpu", "--threads", "1"),
    *("--ema", "0.9", "--optimizer", "sgd", "--lr", "1", "--head-init-scale", "1", "--recipe", "plain"),
)
RANK = """
import sys
import torch
from torch import nn
import train
from clips import command

compile_module, made = nn.Module.compile, []
nn.Module.compile = lambda module, dynamic: compile_module(module, backend="eager", dynamic=dynamic)  # captured and split as ever; no compiler is needed

def kept(*arguments, build=train.build):
    made.append(build(*arguments))
    return made[0]

train.build = kept
out = sys.argv.pop(1)
code = command.run(train.main)
run = made[0]
if code == 0:
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.save({"ema": run.ema.state_dict(), "model": run.model.state_dict(), "graphs": graphs}, f"{out}/rank{run.group.rank}.pt")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_home(tmp_path_factory.mktemp("npz"), COUNTS, frames=5, height=40, width=40)
    output = tmp_path_factory.mktemp("shards") / "zstd"
    pack(PackConfig(home, output, codec="zstd", workers=1, shard_mib=0.5))
    return output


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers: there is little to compile."""
    return write_checkpoint(tmp_path_factory.mktemp("start") / "videomae", plain_model("videomae"))


@pytest.fixture(scope="module")
def alone(shards: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, not compiled."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train.train(train.parse(words(shards, start, folder)), Group(0, 1, 0, torch.device("cpu"), "single"), RunFolder(folder))
    torch.set_num_threads(before)
    return folder


@pytest.fixture(scope="module")
def compiled_on_two(shards: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two compiled ranks; what each had at its end lies beside the run."""
    above = tmp_path_factory.mktemp("two")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(above), *words(shards, start, above / "run"), "--compile"]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0] and "Warning" not in "".join(said), said
    return above


@pytest.fixture
def one_rank_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


def words(home: Path, start: Path, folder: Path) -> list[str]:
    return ["--dataset-home", str(home), "--model-name", str(start), "--logger-folder", str(folder), *FLAGS]


def values(folder: Path, name: str) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def last_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(sorted((folder / "checkpoints").glob("*.pt"))[-1], weights_only=True)
    return state


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_shapes_stay_plain_transformers_after_surgery_compile_ddp_and_ema(family: str, tmp_path: Path, one_rank_group: None) -> None:
    model = build_model(ModelConfig(str(write_checkpoint(tmp_path / family, plain_model(family))), drop_path=0.1, head_init_scale=1.0), CLASSES)
    plain = shapes(plain_model(family, num_labels=2).state_dict())
    assert shapes(model.state_dict()) == plain
    model.compile(backend="eager")
    parallel, ema = in_parallel(model), Ema(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(parallel.train()(clips()), torch.tensor([0, 1])).backward()
    optimizer.step()
    ema.update()
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert shapes(own) == shapes(parallel.module.state_dict()) == shapes(ema.state_dict()["average"]) == plain
    with ema.in_place():
        assert shapes(model.state_dict()) == plain and not torch.equal(model.state_dict()["classifier.weight"], own["classifier.weight"])


def test_two_compiled_ranks_train_to_the_losses_metrics_and_weights_of_one_that_is_not(alone: Path, compiled_on_two: Path) -> None:
    run = compiled_on_two / "run"
    losses = values(alone, "train/loss")
    assert len(losses) == 8 and len(set(losses)) == 8 and values(run, "train/loss") == pytest.approx(losses, rel=1e-5)
    assert values(run, "train/grad_norm") == pytest.approx(values(alone, "train/grad_norm"), rel=1e-4)
    assert values(run, "val/loss") == pytest.approx(values(alone, "val/loss"), rel=1e-5) and values(run, "val/auroc") == values(alone, "val/auroc")
    assert_close(last_state(run)["model"], last_state(alone)["model"], atol=1e-5)
    assert torch.load(compiled_on_two / "rank0.pt", weights_only=True)["graphs"] > 0  # it was compiled


def test_two_ranks_hold_the_same_average_which_is_that_of_one_rank(start: Path, alone: Path, compiled_on_two: Path) -> None:
    ranks = [torch.load(compiled_on_two / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    expected, began = last_state(alone), build_model(ModelConfig(str(start), head_init_scale=1.0), CLASSES).state_dict()
    for one, other in ((ranks[0]["ema"]["average"], ranks[1]["ema"]["average"]), (ranks[0]["model"], ranks[1]["model"])):
        assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert [state["ema"]["updates"] for state in (*ranks, expected)] == [8, 8, 8]
    average = expected["ema"]["average"]
    assert_close(ranks[0]["ema"]["average"], average)
    for elsewhere in (began, expected["model"]):  # it is neither where the run began nor where it ended
        assert max(float((average[key] - elsewhere[key]).abs().max()) for key in average) > 1e-3


def test_best_of_two_compiled_ranks_holds_the_average_under_plain_keys(alone: Path, compiled_on_two: Path) -> None:
    found, expected = (load_file(folder / "best" / "model.safetensors") for folder in (compiled_on_two / "run", alone))
    assert shapes(found) == shapes(expected) and not [key for key in found if "module." in key or "_orig_mod" in key]
    assert_close(found, expected)
    assert values(alone, "val/loss")[1] < values(alone, "val/loss")[0]  # so best/ is of the end
    assert torch.equal(found["classifier.weight"], torch.load(compiled_on_two / "rank0.pt", weights_only=True)["ema"]["average"]["classifier.weight"])
