"""What a run or a measurement ran on, for the reader who wants to repeat it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "webdataset", "numpy", "scikit-learn", "simplejpeg")


def describe() -> dict[str, Any]:  # Any: what JSON holds
    """Versions, git commit of this code, host, CPU and GPUs, as JSON holds them; what cannot be found is None."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the clone that holds `folder`, with -dirty when files differ from it; None outside a clone or without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def package_version(name: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str | None:
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or None)
