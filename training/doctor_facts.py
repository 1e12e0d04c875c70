"""What the doctor looks at: flags, job, cores, GPUs, disks, shards, weights, versions. It judges nothing, and imports no torch, which takes seconds.

flags of train.py, this node -> gather -> Facts, of which doctor_checks says what they mean
"""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import platform
import re
import resource
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from clips.environment import Allocation, allocation
from clips.errors import InputError
from clips.manifest import ShardEntry, is_packed, read_manifest
from loaders.store import RESERVE_BYTES

from .doctor_checkpoint import Weights, find_weights, is_offline
from .doctor_flags import Asked
from .doctor_gpus import Gpus, find_gpus

SETUP = Path(__file__).parents[1] / "setup.cfg"
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Place:
    """A folder that is there or will be made, and the disk that it is or will be on."""

    path: Path
    exists: bool
    writable: bool  # it, or the nearest folder above it that exists
    kind: str  # as /proc/mounts names the file system
    free_bytes: int
    total_bytes: int
    is_temporary: bool = False  # below a folder for temporary files of this node


@dataclass(frozen=True)
class Shards:
    """The packed home: for each split its number of shards, all their bytes, and those that the stage folder does not hold yet."""

    counts: Mapping[str, int]
    num_bytes: int
    unstaged_bytes: int


@dataclass(frozen=True)
class Facts:
    """All that the checks judge."""

    asked: Asked
    allocation: Allocation = field(default_factory=Allocation)
    host: str = ""
    now_s: float = 0.0  # since 1970
    cores: int = 1  # that this process may be scheduled on
    cgroup_cores: float | None = None  # of time that its cgroup may use; None: no limit
    gpus: Gpus = field(default_factory=Gpus)
    torch_version: str | None = None
    torch_cuda: str | None = None  # such as 12.6; None: the build for CPUs
    shm_bytes: int | None = None  # free in /dev/shm
    max_open_files: int | None = None  # the hard limit, to which training raises its own; None: no limit
    home: Place | None = None
    home_error: str | None = None
    shards: Shards | None = None  # None: not packed, or not there
    stage: Place | None = None
    runs: Place | None = None
    written_bytes: tuple[int, ...] = ()  # by each run of the sweep so far, or by the only run
    run: int | None = 0  # which of them is this one; None: not said
    weights: Weights | None = None  # None: no --model-name
    offline: bool = False
    versions: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)  # name to what is installed and what is expected


def gather(asked: Asked) -> Facts:
    """The facts of this node and these flags."""
    torch_version, torch_cuda = torch_build()
    shards, home_error = find_shards(asked.dataset_home, asked.stage_dir) if asked.dataset_home else (None, None)
    return Facts(
        asked=asked,
        allocation=allocation(),
        host=platform.node(),
        now_s=time.time(),
        cores=len(os.sched_getaffinity(0)),
        cgroup_cores=cgroup_cores(),
        gpus=find_gpus(),
        torch_version=torch_version,
        torch_cuda=torch_cuda,
        shm_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        max_open_files=None if (most := resource.getrlimit(resource.RLIMIT_NOFILE)[1]) == resource.RLIM_INFINITY else most,
        home=look_at(asked.dataset_home) if asked.dataset_home else None,
        home_error=home_error,
        shards=shards,
        stage=look_at(asked.stage_dir) if asked.stage_dir else None,
        runs=look_at(asked.runs[0].parent if asked.sweep else asked.runs[0]) if asked.runs else None,
        written_bytes=tuple(map(bytes_written, asked.runs)),
        run=asked.run,
        weights=find_weights(asked.model_name) if asked.model_name else None,
        offline=is_offline(),
        versions=find_versions(),
    )


def cgroup_cores(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores' worth of time that the tightest of this process's cgroups leaves it (versions 1 and 2); None without a limit."""
    limits = []
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        group = base / path.lstrip("/")
        while True:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            words = " ".join(_read(group / name) for name in names).split()
            if len(words) == 2 and all(word.isdecimal() for word in words):
                limits.append(int(words[0]) / int(words[1]))
            if group == base or base not in group.parents:
                break
            group = group.parent
    return min(limits, default=None)


def torch_build() -> tuple[str | None, str | None]:
    """Torch's version and the CUDA that it was built for, as its version.py says them."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None, None
    text = _read(Path(found.origin).with_name("version.py"))
    said = {name: ast.literal_eval(value) for name, value in re.findall(r"^(__version__|cuda)\b[^=\n]*=\s*(None|'[^']*'|\"[^\"]*\")\s*$", text, re.MULTILINE)}
    return said.get("__version__"), said.get("cuda")


def look_at(path: Path, mounts: Path = Path("/proc/self/mounts")) -> Place:
    """The folder and its disk."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    disk = shutil.disk_usage(there)
    real = there.resolve()
    local = [Path(folder).resolve() for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")]
    return Place(
        path=path,
        exists=path.exists(),
        writable=os.access(there, os.W_OK | os.X_OK) and there.is_dir(),
        kind=file_system_of(real, _read(mounts)),
        free_bytes=disk.free,
        total_bytes=disk.total,
        is_temporary=any(folder == real or folder in real.parents for folder in local),
    )


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, by the text of /proc/mounts, in which spaces are \\040 and the last of two mounts hides the first."""
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        _, mount, found = line.split()[:3]
        folder = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), mount))
        if (folder == path or folder in path.parents) and len(folder.parts) >= best:
            best, kind = len(folder.parts), found
    return kind


def find_shards(home: Path, stage_dir: Path | None) -> tuple[Shards | None, str | None]:
    """The shards of a packed home, or what is wrong with it; neither for a folder of npz."""
    if not home.is_dir():
        return None, "no such folder"
    if not is_packed(home):
        return None, None
    try:
        splits = read_manifest(home).splits
    except InputError as error:
        return None, str(error)
    shards = [shard for split in splits.values() for shard in split.shards]
    unstaged = [shard for shard in shards if not (stage_dir and is_staged(shard, stage_dir))]
    counts = {name: len(split.shards) for name, split in splits.items()}
    return Shards(counts, _bytes(shards), _bytes(unstaged)), None


def is_staged(shard: ShardEntry, folder: Path) -> bool:
    """Whether the store of `loaders stage` holds the shard; looks without making the store."""
    copy = folder / f"gesture-clips-{os.geteuid()}" / "by-sha256" / f"{shard.tar_sha256}.tar"
    return _size(copy) == shard.tar_bytes


def room_to_stage(stage: Place) -> int:
    """What staging may fill, which leaves a reserve to others."""
    return max(0, stage.free_bytes - min(RESERVE_BYTES, stage.total_bytes // 20))


def bytes_written(run: Path) -> int:
    """What the run's folder already holds of its checkpoints and of best/."""
    return sum(_size(file) for part in ("checkpoints", "best") for file in (run / part).glob("*"))


def _size(file: Path) -> int:
    """0 for a folder, and for what the run's own job removes meanwhile."""
    try:
        found = file.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def find_versions(setup: Path = SETUP) -> dict[str, tuple[str | None, str]]:
    """Python and each library that training needs: what is installed (None: nothing), and setup.cfg's range of versions."""
    config = configparser.ConfigParser()
    config.read(setup, encoding="utf-8")
    found: dict[str, tuple[str | None, str]] = {}
    if python := config.get("options", "python_requires", fallback=""):
        found["python"] = platform.python_version(), python
    wanted = config.get("options", "install_requires", fallback="") + "\n" + config.get("options.extras_require", "train", fallback="")
    for line in wanted.split("\n"):
        if match := re.match(r"\s*([\w.-]+)\s*(.*)$", line):
            found[match[1]] = _installed(match[1]), match[2]
    return found


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _bytes(shards: list[ShardEntry]) -> int:
    return sum(shard.tar_bytes for shard in shards)


def _read(path: Path) -> str:
    """The text of a small file of the system; nothing where there is none."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
