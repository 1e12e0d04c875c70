"""The doctor finds each fault when it is planted, and none where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

import train
from clips.environment import Allocation, Array, allocation
from loaders import shards, stream
from training import __main__ as entry
from training import doctor_checks, doctor_data
from training.doctor import CHECKS, doctor, examine, summary
from training.doctor_checkpoint import Weights
from training.doctor_facts import Facts, Place, Shards, gather
from training.doctor_flags import Asked, read_flags
from training.doctor_gpus import Gpus

GB = 10**9
ROOT = Path(__file__).parents[1]
JOB = Allocation("77", False, 16, 16, 1, 4, 4, "0,1,2,3", 90_000.0)
HEALTHY = Facts(
    asked=Asked(Path("/data/shards"), Path("/scratch/77"), "videomae", runs=(Path("/runs/a"),)),
    allocation=JOB,
    host="n1",
    now_s=3600.0,
    cores=64,
    gpus=Gpus(4, (12, 4)),
    torch_version="2.13.0+cu126",
    torch_cuda="12.6",
    shm_bytes=64 * GB,
    max_open_files=524288,
    home=Place(Path("/data/shards"), True, False, "nfs4", 100 * GB, 1000 * GB),
    shards=Shards({"train": 300, "val": 20, "test": 20}, 90 * GB, 90 * GB),
    stage=Place(Path("/scratch/77"), True, True, "xfs", 900 * GB, 1000 * GB),
    runs=Place(Path("/runs/a"), False, True, "nfs4", 100 * GB, 1000 * GB),
    written_bytes=(0,),
    weights=Weights("videomae", "here", 86_230_000),
    offline=True,
    versions={"python": ("3.11.7", ">=3.10,<3.14"), "torch": ("2.13.0+cu126", ">=2.6"), "transformers": ("5.23.0", ">=5.17,<6")},
)
DESK = Facts(asked=Asked(), torch_version="2.13.0+cpu", cores=8, gpus=Gpus(error="no NVIDIA driver"))


def job(**changed: Any) -> dict[str, Any]:
    return {"allocation": replace(JOB, **changed)}


def asked(**changed: Any) -> dict[str, Any]:
    return {"asked": replace(HEALTHY.asked, **changed)}


def place(name: str, **changed: Any) -> dict[str, Any]:
    return {name: replace(getattr(HEALTHY, name), **changed)}


def test_a_healthy_node_is_well() -> None:
    assert [str(finding) for finding in examine(HEALTHY) if finding.state != "ok"] == []
    assert all(finding.fix == "" for finding in examine(HEALTHY))


def test_a_desk_without_slurm_and_gpu_is_well() -> None:
    assert [str(finding) for finding in examine(DESK) if finding.state != "ok"] == []


FAULTS = [
    ("cores", "warn", asked(threads=17), "may use 16 cores; --threads 17: give --threads 16, or ask sbatch for --cpus-per-task=17"),
    ("cores", "warn", {**job(srun_cpus_per_task=4), **asked(threads=5)}, "may use 4 cores; --threads 5: give --threads 4"),
    ("cores", "warn", {"cgroup_cores": 3.5}, "takes 8 threads, but the cgroup has 3.5 cores' time: give --threads 3"),
    ("cores", "warn", job(cpus_per_task=2, srun_cpus_per_task=2), "too few to decode for a GPU: ask sbatch for --cpus-per-task=8"),
    ("cores", "warn", job(cpus_per_task=None, srun_cpus_per_task=None, tasks_per_node=32), "may use 2 cores"),
    ("cores", "warn", {**job(in_step=True, cpus_per_task=1), "cores": 1}, "may use 1 core; the loader takes 1 thread, too few"),
    ("srun cores", "fail", job(srun_cpus_per_task=None), "gives each task 1 of its 16 cores: export SRUN_CPUS_PER_TASK="),
    ("srun cores", "fail", {**job(in_step=True), "cores": 1}, "16 cores were asked for each task, this one has 1"),
    ("srun cores", "warn", job(srun_cpus_per_task=4), "leaves 12 of a task's 16 cores idle"),
    ("ranks", "fail", job(rank="0"), "RANK=0 without WORLD_SIZE: unset RANK"),
    ("ranks", "fail", {"allocation": Allocation(world_size="4")}, "WORLD_SIZE=4 without RANK: unset WORLD_SIZE"),
    ("ranks", "fail", job(rank="0", world_size="4"), "though torchrun did not start this: unset RANK WORLD_SIZE"),
    ("GPUs", "fail", job(tasks_per_node=8), "4 GPUs for 8 tasks: ask sbatch for --ntasks-per-node=4, or for --gres=gpu:8"),
    ("GPUs", "warn", job(tasks_per_node=1), "4 GPUs for 1 task: 3 idle"),
    ("GPUs", "fail", {"gpus": Gpus(0, None, "no NVIDIA driver")}, "4 GPUs should be visible, none can be used (no NVIDIA driver)"),
    ("GPUs", "fail", {**job(visible_gpus="2", gpus_on_node=None), "gpus": Gpus(0, (12, 4), "the driver shows no GPU")}, "1 GPU should be visible"),
    ("GPUs", "fail", {"gpus": Gpus(2, (12, 4))}, "CUDA_VISIBLE_DEVICES=0,1,2,3 names 4, usable: 2"),
    ("GPUs", "fail", {"allocation": Allocation("7"), "gpus": Gpus(error="no NVIDIA driver"), **asked(device="cuda")}, "ask sbatch for --gres=gpu:1"),
    ("GPUs", "fail", {**job(in_step=True, gpus_on_node=1, visible_gpus="0"), "gpus": Gpus(1, (12, 4))}, "1 GPU for 4 tasks"),
    ("GPUs", "warn", asked(device="cpu"), "--device cpu leaves 4 GPUs of this job idle"),
    ("driver", "fail", {"torch_version": "2.13.0+cpu", "torch_cuda": None}, "for CPUs, the driver knows CUDA 12.4: install torch's build for CUDA 12"),
    ("driver", "fail", {"torch_cuda": "13.0"}, "for CUDA 13.0, the driver knows CUDA 12.4: install torch's build for CUDA 12, or"),
    ("driver", "warn", {"torch_cuda": "13.0", "gpus": Gpus(0, (12, 4), "the driver shows no GPU")}, "for CUDA 13.0"),
    ("driver", "fail", {"torch_version": None, "torch_cuda": None}, "torch is not installed"),
    ("/dev/shm", "warn", {"shm_bytes": 64 << 20}, "67.1 MB free for 4 ranks of NCCL: give the container more"),
    ("/dev/shm", "warn", {"shm_bytes": None}, "there is none for 4 ranks"),
    ("open files", "fail", {"max_open_files": 339}, "at most 339; each rank opens 340 shards: ask for a hard limit of 852"),
    ("open files", "warn", {"max_open_files": 851}, "each rank opens 340 shards"),
    ("open files", "fail", {"max_open_files": 619, **asked(fold="1/5")}, "each rank opens 620 shards"),
    ("time limit", "warn", {"now_s": 90_000.0 - 19 * 60}, "19 min left"),
    ("flags", "fail", asked(sweep=Path("s.txt"), error="--sweep s.txt: holds no line of flags."), "holds no line of flags: repair it"),
    ("dataset home", "fail", {"shards": None, "home_error": "no such folder"}, "/data/shards: no such folder"),
    ("dataset home", "warn", {"shards": None}, "/data/shards on nfs4 holds no shards"),
    ("dataset home", "warn", {**place("home", is_temporary=True), **job(num_nodes=2)}, "is temporary and of this node alone"),
    ("dataset home", "warn", {**place("home", is_temporary=True), **job(array=Array(1, 2, 1, 2))}, "is temporary and of this node alone"),
    ("dataset home", "warn", {**place("home", is_temporary=True), "allocation": Allocation()}, "is temporary and of this node alone"),
    ("dataset home", "warn", place("home", kind="tmpfs"), "on tmpfs counts against the job's memory"),
    ("stage folder", "fail", place("stage", path=Path("")), "--stage-dir has an empty name: is $TMPDIR set"),
    ("stage folder", "fail", place("stage", writable=False), "cannot be written to"),
    ("stage folder", "warn", place("stage", kind="lustre"), "/scratch/77 on lustre is reached over the network"),
    ("stage folder", "warn", place("stage", kind="tmpfs"), "counts against the job's memory"),
    ("stage folder", "warn", place("stage", free_bytes=94 * GB), "90.0 GB to copy, 88.6 GB may be used there; the rest is read from the dataset home"),
    ("logger folder", "fail", place("runs", writable=False), "/runs/a on nfs4 cannot be written to"),
    ("logger folder", "warn", place("runs", is_temporary=True), "a later job does not find the run"),
    ("logger folder", "warn", place("runs", kind="tmpfs"), "a later job does not find the run"),
    ("room for runs", "fail", place("runs", free_bytes=3 * GB), "about 3.8 GB for 1 run (estimated, 3.8 GB each), 3.0 GB are free: make room on /runs/a"),
    ("room for runs", "warn", {"written_bytes": (0,) * 27, "run": 3}, "about 102.4 GB for 27 runs"),
    ("room for runs", "fail", {"written_bytes": (4 * GB, 0), "run": None, **place("runs", free_bytes=3 * GB)}, "for 2 runs"),
    ("weights", "fail", {"weights": Weights("videomae", "hub", None)}, "HF_HUB_OFFLINE forbids the network: run python -m models fetch videomae"),
    ("weights", "warn", {"weights": Weights("a/b", "hub", None), "offline": False}, "compute nodes often see no network"),
    ("weights", "fail", {"weights": Weights("videomea", "nowhere", None)}, "--model-name videomea: neither a model"),
    ("versions", "fail", {"versions": {"torch": ("2.5.1", ">=2.6"), "numpy": ("2.4.6", ">=1.26,<3")}}, "ranges: torch 2.5.1 (>=2.6): run make install"),
    ("versions", "fail", {"versions": {"transformers": (None, ">=5.17,<6")}}, "transformers is missing (>=5.17,<6)"),
]


@pytest.mark.parametrize(("check", "state", "planted", "said"), FAULTS)
def test_a_planted_fault_is_found_and_a_fix_is_told(check: str, state: str, planted: dict[str, Any], said: str) -> None:
    finding = next(one for one in examine(replace(HEALTHY, **planted)) if one.check == check)
    assert finding.state == state, finding
    assert said in str(finding)
    assert finding.fix


def test_every_check_has_a_planted_fault_or_is_never_ill() -> None:
    assert {finding.check for finding in examine(HEALTHY)} - {check for check, *_ in FAULTS} == {"shards"}
    assert len({finding.check for finding in examine(HEALTHY)}) == len(CHECKS)


@pytest.mark.parametrize(
    "fine",
    [
        {**job(in_step=True, visible_gpus="0"), "gpus": Gpus(1, (12, 4)), "cores": 16},  # srun --gpus-per-task=1
        {**job(rank="1", world_size="4", under_torchrun=True)},
        {**place("home", is_temporary=True), **job(array=None)},  # staged by hand, for this one node
        {"torch_cuda": "12.9"},  # a newer minor version runs on this driver
        {"gpus": Gpus(4, (13, 0))},
        {"max_open_files": 852},
        {"max_open_files": None},
        {**place("stage", free_bytes=50 * GB), "shards": Shards({"train": 1}, 90 * GB, GB)},  # the rest is there already
        {**place("runs", free_bytes=GB), "written_bytes": (3 * GB,)},
        {"written_bytes": (0,) * 26, "run": 3},
        {"weights": Weights("videomae-tiny", "random", 595_000)},
        {"cgroup_cores": 8.0},
        job(end_time_s=None),
        asked(threads=16),
    ],
)
def test_what_is_no_fault_is_no_fault(fine: dict[str, Any]) -> None:
    assert [str(finding) for finding in examine(replace(HEALTHY, **fine)) if finding.state != "ok"] == []


def test_the_doctor_counts_as_the_loader_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (doctor_checks.MAX_THREADS, doctor_checks.SPARE_FILES) == (stream.MAX_THREADS, shards.SPARE_FILES)
    for cores in (1, 3, 8, 40):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        for environ in ({}, {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}):
            for name, value in environ.items():
                monkeypatch.setenv(name, value)
            assert doctor_checks.threads_of_loader(gather(Asked())) == stream.default_threads()
        monkeypatch.delenv("SLURM_JOB_ID")
        monkeypatch.delenv("SLURM_STEP_ID")


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [(name, True) for name in ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.sshfs", "fuse.glusterfs", "wekafs", "9p")]
    + [(name, False) for name in ("ext4", "xfs", "btrfs", "zfs", "overlay", "fuse.fuse-overlayfs", "tmpfs", "unknown")],
)
def test_file_systems_over_the_network_are_known(kind: str, is_network: bool) -> None:
    assert bool(doctor_data.OVER_THE_NETWORK.fullmatch(kind)) is is_network


RELEASES = st.lists(st.integers(0, 12), min_size=1, max_size=3).map(lambda numbers: ".".join(map(str, numbers)))


@given(RELEASES, st.sampled_from(["", "+cu126"]), st.lists(st.tuples(st.sampled_from([">=", "<", "<=", ">", "==", "!="]), RELEASES), max_size=2))
def test_a_range_of_versions_is_read_as_packaging_reads_it(found: str, local: str, bounds: list[tuple[str, str]]) -> None:
    wanted = ",".join("".join(bound) for bound in bounds)
    local = local if not any(operator in (">", "<=", "==") for operator, _ in bounds) else ""  # there packaging looks at the local part too
    assert doctor_data.is_within(found + local, wanted) == SpecifierSet(wanted).contains(found + local)


def test_zeros_at_a_versions_end_say_nothing() -> None:
    assert doctor_data.is_within("5", ">=5.0") and doctor_data.is_within("5.0.0", "<=5") and not doctor_data.is_within("6.0", "<6")


BATCH = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "4,2",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_GPUS_ON_NODE": "4",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    "SLURM_JOB_END_TIME": "1700000000",
    "SLURM_PROCID": "0",
}


def test_a_job_is_read_from_its_variables() -> None:
    assert allocation({}) == Allocation()
    assert allocation(BATCH) == Allocation("12", False, 8, None, 2, 4, 4, "0,1,2,3", 1.7e9)
    step = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "3(x2)", "SRUN_CPUS_PER_TASK": "8"}
    assert allocation(step) == Allocation("12", True, 8, 8, 1, 3, 4, "0,1,2,3", 1.7e9)
    assert allocation(BATCH | {"SLURM_NTASKS_PER_NODE": "1"}).tasks_per_node == 1
    assert allocation(BATCH | {"SLURM_TASKS_PER_NODE": "2(x12),1"}).tasks_per_node == 2
    assert allocation({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}) == Allocation(rank="1", world_size="2", under_torchrun=True)
    assert allocation({"SLURM_CPUS_PER_TASK": "many", "SLURM_TASKS_PER_NODE": "?"}) == Allocation()


def test_flags_of_train_that_the_doctor_does_not_know_do_not_hurt() -> None:
    words = ["--lr", "-1e-3", "--balance", "--dataset_home", "D", "--classes", "a", "b", "--logger-folder=L", "--model", "x", "--threads", "3"]
    assert read_flags(words, None) == Asked(dataset_home=Path("D"), threads=3, runs=(Path("L"),))
    assert read_flags(["--threads", "two", "--model-name"], None) == Asked()
    assert read_flags(["--threads", "0", "--stage-dir", ""], None) == Asked(stage_dir=Path())


def test_a_sweeps_line_counts_before_the_command(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--lr 1e-3\n--model-name timesformer --dataset-home E\n")
    words = ["--sweep", str(sweep), "--logger-folder", "L", "--model-name", "videomae", "--dataset-home", "D"]
    every = (Path("L/lr-1e-3"), Path("L/model-name-timesformer_dataset-home-E"))
    assert read_flags(words, None) == Asked(Path("D"), None, "videomae", sweep=sweep, runs=every, run=None)
    assert read_flags(words, Array(2, 2, 1, 2)) == Asked(Path("E"), None, "timesformer", sweep=sweep, runs=every, run=1)
    assert read_flags([*words, "--line", "1"], Array(2, 2, 1, 2)) == Asked(Path("D"), None, "videomae", sweep=sweep, runs=every, run=0)
    wrong = read_flags(words, Array(3, 3, 1, 3))
    assert wrong.dataset_home == Path("D") and "element 3 of the job array has no line" in str(wrong.error)
    assert "no such file" in str(read_flags(["--sweep", str(tmp_path / "none")], None).error).lower()


def test_a_config_fills_what_the_command_leaves_out(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"dataset_home": "D", "model_name": "videomae", "threads": 5, "stage_dir": None, "logger_folder": "OLD", "lr": 1e-3}))
    found = read_flags(["--config", str(config), "--model-name", "timesformer"], None)
    assert found == Asked(Path("D"), None, "timesformer", threads=5)
    assert "no such file" in str(read_flags(["--config", str(tmp_path / "none")], None).error)


def test_no_flag_of_train_is_one_of_the_doctors() -> None:
    with pytest.raises(SystemExit):
        train.parse(["--dataset-home", "D", "--logger-folder", "L", "--epochs", "1", "--model-name", "m", "--quiet"])
    with pytest.raises(SystemExit):
        train.parse(["--dataset-home", "D", "--logger-folder", "L", "--epochs", "1", "--model-name", "m", "--json"])


def test_the_exit_code_and_what_quiet_and_json_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ill = ["--dataset-home", str(tmp_path / "none"), "--model-name", "videomae-tiny", "--lr", "1e-3"]
    assert doctor(ill) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) + 1 and lines[-1].startswith(f"doctor: {len(CHECKS)} checks on ")
    assert doctor(["--quiet", *ill]) == 1
    quiet = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fail  dataset home: ") for line in quiet) and not any(line.startswith("ok") for line in quiet)
    assert doctor(["--json", *ill]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [f"{one['state']:4}" for one in found] == [line[:4] for line in lines[:-1]]
    assert set(found[0]) == {"check", "state", "found", "fix"}


def test_the_summary_counts() -> None:
    findings = examine(replace(HEALTHY, home_error="no such folder", torch_version=None))
    assert summary(findings, "n1", 0.84) == "doctor: 16 checks on n1 in 0.8 s: 14 ok, 2 fail"


def test_the_command_is_quick_because_it_leaves_torch_alone(tmp_path: Path) -> None:
    code = "import sys; from training import __main__ as m; print(m.main()); print({'torch', 'transformers', 'webdataset'} & set(sys.modules))"
    words = ["doctor", "--model-name", "videomae-tiny", "--logger-folder", str(tmp_path / "run"), "--epochs", "3"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["0", "set()"], done.stdout


def test_help_names_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "--help"])
    with pytest.raises(SystemExit):
        entry.main()
    assert "doctor" in capsys.readouterr().out
