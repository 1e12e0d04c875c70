"""The GPUs that CUDA's driver shows to this process, asked without torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpus:
    """What the driver says; CUDA_VISIBLE_DEVICES and the job's cgroup are already taken into account."""

    count: int = 0
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA that it knows; None: no driver
    error: str = ""  # why it shows none


def find_gpus() -> Gpus:
    """Takes part of a second, and leaves nothing on a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Gpus(error="the kernel's NVIDIA driver is there, its library libcuda.so.1 is not" if DRIVER_FILE.exists() else "no NVIDIA driver")
    number = ctypes.c_int(0)
    code = driver.cuDriverGetVersion(ctypes.byref(number))
    if code:
        return Gpus(error=f"libcuda.so.1 answers with error {code}")
    cuda = number.value // 1000, number.value % 1000 // 10
    if code := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):
        return Gpus(0, cuda, "the driver shows no GPU" if code == NO_DEVICE else f"the driver answers with CUDA error {code}")
    return Gpus(number.value, cuda)
