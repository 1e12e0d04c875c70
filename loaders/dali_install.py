"""Whether DALI can work here, and which wheel to take where it cannot; whether the GPU has an engine for JPEG."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from clips.errors import InputError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EXTRAS = {12: "dali", 13: "dali-cuda13"}  # of setup.cfg, by the CUDA version of the wheel that each brings
WHEELS = {12: "nvidia-dali-cuda120", 13: "nvidia-dali-cuda130"}
OTHERWISE = "or take --loader webdataset."


def check_wheel() -> None:
    """Raises InputError where DALI is not installed; a look at the disk, nothing is imported."""
    try:
        found = find_spec("nvidia.dali")
    except ModuleNotFoundError:  # nothing of nvidia's at all
        found = None
    if found is None:
        raise InputError(f"--loader dali: NVIDIA DALI is not installed. {_take(EXTRAS[wanted_cuda()])}")


def check_cuda() -> None:
    """Raises InputError where the installed wheel is for another CUDA version than torch, or for a newer one than the driver."""
    wanted, driver = wanted_cuda(), driver_cuda()
    if driver is not None and driver < wanted:
        fitting = [major for major in WHEELS if major <= driver]
        what = f"With a torch built for CUDA {fitting[-1]} take {WHEELS[fitting[-1]]}" if fitting else "Ask who runs this machine for a newer driver"
        raise InputError(f"--loader dali: the GPU's driver is for CUDA {driver}; {WHEELS[wanted]} needs {wanted}. {what}, {OTHERWISE}")
    installed = [major for major, wheel in WHEELS.items() if _is_installed(wheel)]
    if len(installed) > 1:
        raise InputError(f"--loader dali: {' and '.join(WHEELS.values())} write over each other. Remove both. {_take(EXTRAS[wanted])}")
    if installed and wanted not in installed:
        found = f"{WHEELS[installed[0]]} is installed, but torch is built for CUDA {torch_cuda()}"
        raise InputError(f"--loader dali: {found}. Type: pip uninstall {WHEELS[installed[0]]}. {_take(EXTRAS[wanted])}")


def _take(extra: str) -> str:
    return f"Type: pip install 'gesture-clips[{extra}]', {OTHERWISE}"


def _is_installed(wheel: str) -> bool:
    try:
        return bool(version(wheel))
    except PackageNotFoundError:
        return False


def wanted_cuda() -> int:
    """The CUDA version of the wheel that goes with torch: 12, which needs no CUDA of its own, unless torch is built for a later one."""
    found = torch_cuda()
    return 13 if found is not None and int(found.split(".")[0]) >= 13 else 12


def torch_cuda() -> str | None:
    """Such as '12.8'; None for a torch that knows no GPU."""
    import torch  # here: the process beside the training looks for the wheel too, and has no torch

    return torch.version.cuda


def driver_cuda() -> int | None:
    """The newest CUDA that the driver knows, such as 12; None where there is no driver to ask."""
    found = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return found.value // 1000


@cache
def tell_engine(device: torch.device, hw_decoder_load: float) -> None:
    """Logs, once, what decodes on this GPU: its JPEG engine with its share, or none."""
    import torch

    with torch.cuda.device(device):
        engines = jpeg_engines()
    name = torch.cuda.get_device_name(device)
    if engines is None:
        logger.info(f"--loader dali: nvJPEG does not tell whether {name} has an engine for JPEG")
    elif engines[0] == 0:
        logger.info(f"--loader dali: {name} has no engine for JPEG: DALI decodes on its cores and, in part, on the host's; compare with --loader webdataset")
    else:
        logger.info(f"--loader dali: {engines[0]} JPEG engines of {engines[1]} cores on {name} take {hw_decoder_load:g} of the frames")


def jpeg_engines() -> tuple[int, int] | None:
    """How many JPEG engines the current GPU has and how many cores each, as nvJPEG says; (0, 0) for none, None where it cannot be asked."""
    for path in _nvjpeg_libraries():
        try:
            library = ctypes.CDLL(path)
            return _ask(library.nvjpegCreateSimple, library.nvjpegGetHardwareDecoderInfo, library.nvjpegDestroy)
        except (OSError, AttributeError):
            continue
    return None


def _ask(create: Callable[..., int], tell: Callable[..., int], destroy: Callable[..., int]) -> tuple[int, int] | None:
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    if create(ctypes.byref(handle)) != 0:
        return None
    try:
        status = tell(handle, ctypes.byref(engines), ctypes.byref(cores))
    finally:
        destroy(handle)
    return (engines.value, cores.value) if status == 0 else (0, 0)


def _nvjpeg_libraries() -> Iterator[str]:
    """Those that DALI's wheels bring, then the system's."""
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for found in ("nvjpeg/lib/libnvjpeg.so.*", "cu13/lib/libnvjpeg.so.*"):
            yield from map(str, sorted(Path(folder).glob(found)))
    yield from ("libnvjpeg.so.12", "libnvjpeg.so.13")
