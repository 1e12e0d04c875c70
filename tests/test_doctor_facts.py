"""What the doctor sees of a node, compared with df, torch, our own store and loader, and with made-up /sys and /proc files."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch

from clips.manifest import ShardEntry, read_manifest
from convert.pack import PackConfig, pack
from loaders.store import Store
from models import ModelConfig, build_model
from training import doctor_checkpoint, doctor_gpus
from training.doctor_checkpoint import PARAMETERS, Weights, count_parameters, find_weights
from training.doctor_facts import (
    Shards,
    bytes_written,
    cgroup_cores,
    file_system_of,
    find_shards,
    find_versions,
    gather,
    is_staged,
    look_at,
    room_to_stage,
    torch_build,
)
from training.doctor_flags import Asked
from training.doctor_gpus import Gpus, find_gpus


def test_torchs_build_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_build() == (torch.__version__, torch.version.cuda)
    (tmp_path / "version.py").write_text("from typing import Optional\n__version__ = '2.6.0+cu124'\ndebug = False\ncuda: Optional[str] = '12.4'\nhip = None\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert torch_build() == ("2.6.0+cu124", "12.4")
    (tmp_path / "version.py").write_text('__version__ = "2.6.0"\ncuda = None\n')
    assert torch_build() == ("2.6.0", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert torch_build() == (None, None)


@pytest.mark.parametrize("path", ["/", "/dev/shm", "."])
def test_file_systems_are_those_that_df_names(path: str) -> None:
    said = subprocess.run(["df", "--output=fstype", path], capture_output=True, text=True, check=True).stdout.split()[-1]
    assert look_at(Path(path)).kind == said


def test_the_deepest_and_last_mount_holds_a_path() -> None:
    rows = ("/ ext4", "/home nfs4", "/home/me/my\\040disk xfs", "/ho btrfs", "/mnt tmpfs", "/mnt lustre")
    mounts = "".join(f"device {row} rw 0 0\n" for row in rows)
    found = {path: file_system_of(Path(path), mounts) for path in ("/", "/home/me", "/home/me/my disk/runs", "/homes", "/mnt/a")}
    assert found == {"/": "ext4", "/home/me": "nfs4", "/home/me/my disk/runs": "xfs", "/homes": "ext4", "/mnt/a": "lustre"}
    assert file_system_of(Path("/"), "") == "unknown"


def test_a_folder_that_will_be_made_is_judged_by_the_one_above(tmp_path: Path) -> None:
    there, later = look_at(tmp_path), look_at(tmp_path / "not" / "yet")
    assert there.exists and not later.exists
    assert (later.kind, later.writable, later.total_bytes) == (there.kind, True, there.total_bytes)
    (tmp_path / "file").touch()
    assert not look_at(tmp_path / "file" / "below").writable


def test_folders_for_temporary_files_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert look_at(tmp_path / "a" / "b").is_temporary and look_at(Path("/dev/shm")).is_temporary and not look_at(Path("/etc")).is_temporary


def test_the_tightest_limit_of_all_cgroups_counts(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "sys"
    own.write_text("0::/job/step\n")
    assert cgroup_cores(root, own) is None
    for folder, limit in ((root / "job", "250000 100000"), (root / "job" / "step", "max 100000")):
        folder.mkdir(parents=True)
        (folder / "cpu.max").write_text(limit + "\n")
    assert cgroup_cores(root, own) == 2.5
    (root / "cpu.max").write_text("100000 100000\n")  # in a container the namespace's root has the limit
    assert cgroup_cores(root, own) == 1.0
    assert cgroup_cores(root, tmp_path / "none") is None


def test_limits_of_version_1_count_too(tmp_path: Path) -> None:
    own, folder = tmp_path / "cgroup", tmp_path / "sys" / "cpu,cpuacct" / "job"
    own.write_text("5:cpu,cpuacct:/job\n4:cpuset:/job\n1:name=systemd:/job\n")
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("150000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cores(tmp_path / "sys", own) == 1.5
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup_cores(tmp_path / "sys", own) is None


class Driver:
    """libcuda.so.1 with this version, these answers and GPUs."""

    def __init__(self, version: int, init: int = 0, count: int = 0) -> None:
        self._version, self._init, self._count = version, init, count

    def cuDriverGetVersion(self, place: object) -> int:
        place._obj.value = self._version  # type: ignore[attr-defined]  # what byref points at
        return 0

    def cuInit(self, flags: int) -> int:
        return self._init

    def cuDeviceGetCount(self, place: object) -> int:
        place._obj.value = self._count  # type: ignore[attr-defined]  # as above
        return 0


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (Driver(12040, 0, 4), Gpus(4, (12, 4))),
        (Driver(13000, 100), Gpus(0, (13, 0), "the driver shows no GPU")),
        (Driver(12020, 803), Gpus(0, (12, 2), "the driver answers with CUDA error 803")),
    ],
)
def test_the_driver_is_asked(driver: Driver, found: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert find_gpus() == found


def test_a_node_without_the_drivers_library_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(doctor_gpus, "DRIVER_FILE", tmp_path / "version")
    assert find_gpus() == Gpus(error="no NVIDIA driver")
    (tmp_path / "version").touch()
    assert "libcuda.so.1 is not" in find_gpus().error


def test_shards_are_counted_and_staged_ones_found_where_the_store_keeps_them(packing: PackConfig, tmp_path: Path) -> None:
    pack(packing)
    shards = [shard for split in read_manifest(packing.output).splits.values() for shard in split.shards]
    tars = {path.stem: path for path in packing.output.rglob("*.tar")}
    whole = sum(path.stat().st_size for path in tars.values())
    stage = tmp_path / "stage"
    found, error = find_shards(packing.output, stage)
    counts = {split: len([*(packing.output / split).glob("*.tar")]) for split in ("train", "val")}
    assert error is None and found == Shards(counts, whole, whole)
    assert not stage.exists()
    first: ShardEntry = shards[0]
    Store(stage).path(first).write_bytes(tars[first.name].read_bytes())
    assert is_staged(first, stage) and not is_staged(shards[1], stage)
    again, _ = find_shards(packing.output, stage)
    assert again is not None and again.unstaged_bytes == whole - first.tar_bytes


def test_room_to_stage_is_what_the_store_may_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for total, free in ((1000 * 10**9, 300 * 10**9), (20 * 10**9, 9 * 10**9)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, total=total, free=free: SimpleNamespace(total=total, free=free))
        assert room_to_stage(look_at(tmp_path)) == Store(tmp_path).room_bytes()


def test_homes_without_shards_are_told_apart(tmp_path: Path) -> None:
    assert find_shards(tmp_path / "none", None) == (None, "no such folder")
    assert find_shards(tmp_path, None) == (None, None)
    (tmp_path / "manifest.json").write_text("{")
    found, error = find_shards(tmp_path, None)
    assert found is None and error is not None and "not readable as JSON" in error


def test_the_sizes_of_known_models_are_right() -> None:
    for name in ("videomae-tiny", "timesformer-tiny"):
        model = build_model(ModelConfig(name), ("a", "b"))
        assert PARAMETERS[name] == pytest.approx(sum(one.numel() for one in model.parameters()), rel=0.01)


def test_weights_are_counted_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "best"
    folder.mkdir()
    assert find_weights(str(folder)) == Weights(str(folder), "here", None)
    safetensors.numpy.save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros(7, np.float32)}, folder / "model.safetensors")
    assert find_weights(str(folder)) == Weights(str(folder), "here", 22)
    (tmp_path / "weights.pt").write_bytes(bytes(4000))
    assert count_parameters(tmp_path / "weights.pt") == 1000
    (folder / "model.safetensors").write_bytes(b"no header")
    assert count_parameters(folder) is None
    monkeypatch.setattr(doctor_checkpoint, "cached", lambda name: folder if name == "me/mine" else None)
    assert find_weights("me/mine").state == "here" and find_weights("me/other") == Weights("me/other", "hub", None)
    assert find_weights("videomae") == Weights("videomae", "hub", 86_230_000)
    assert find_weights("videomae-tiny").state == "random" and find_weights("./none").state == "nowhere" and find_weights("videomea").state == "nowhere"


def test_versions_stand_beside_setup_cfgs_ranges(tmp_path: Path) -> None:
    found = find_versions()
    assert found["torch"] == (torch.__version__, ">=2.6") and found["numpy"][0] == np.__version__ and found["python"][1] == ">=3.10,<3.14"
    assert {"transformers", "webdataset", "msgpack"} <= set(found) and not {"pytest", "nvidia-dali-cuda120"} & set(found)
    setup = tmp_path / "setup.cfg"
    setup.write_text("[options]\npython_requires = >=3.10\ninstall_requires =\n    no-such-library-of-ours>=1\n")
    assert find_versions(setup)["no-such-library-of-ours"] == (None, ">=1")
    assert find_versions(tmp_path / "none") == {}


def test_what_a_run_wrote_is_its_checkpoints_and_best(tmp_path: Path) -> None:
    for name in ("checkpoints/step-1.pt", "best/model.safetensors", "metrics.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
    assert bytes_written(tmp_path) == 200 and bytes_written(tmp_path / "none") == 0
    (tmp_path / "checkpoints" / "gone.pt").symlink_to("removed-by-its-own-job")  # listed, but no longer there
    assert bytes_written(tmp_path) == 200


def test_a_sweep_is_looked_at_as_a_whole(tmp_path: Path) -> None:
    facts = gather(Asked(sweep=tmp_path / "s.txt", runs=(tmp_path / "runs" / "a", tmp_path / "runs" / "b"), run=1))
    assert facts.runs is not None and facts.runs.path == tmp_path / "runs" and facts.written_bytes == (0, 0) and facts.run == 1
    assert facts.cores >= 1 and facts.shm_bytes and facts.torch_version == torch.__version__ and facts.home is None
