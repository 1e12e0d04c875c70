"""What is said where DALI, its CUDA, the driver or the JPEG engine is missing; runs without DALI as with it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clips.errors import InputError
from loaders import dali_install
from loaders.dali_install import check_cuda, check_wheel, jpeg_engines, tell_engine, wanted_cuda
from loaders.source import open_source
from tests.loading import MANY_SHARDS_MIB, opened, shards
from training.run_folder import FREE, check_same

CUDA12, CUDA13 = "nvidia-dali-cuda120", "nvidia-dali-cuda130"


@pytest.fixture
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.getbasetemp(), "jpeg", MANY_SHARDS_MIB)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`here(torch, driver, *wheels)`: what is installed, in words."""

    def version(name: str) -> str:
        if name in wheels:
            return "2.4.0"
        raise importlib.metadata.PackageNotFoundError(name)

    wheels: set[str] = set()

    def arrange(cuda_of_torch: str | None, driver: int | None, *installed: str) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda_of_torch)
        monkeypatch.setattr(dali_install, "driver_cuda", lambda: driver)
        monkeypatch.setattr(dali_install, "version", version)
        wheels.update(installed)

    return arrange


@pytest.mark.parametrize(("cuda_of_torch", "extra"), [(None, "dali"), ("11.8", "dali"), ("12.8", "dali"), ("13.0", "dali-cuda13"), ("14.1", "dali-cuda13")])
@pytest.mark.parametrize("what", ["no nvidia at all", "no dali"])
def test_without_the_wheel_the_error_says_which_to_take(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., None], cuda_of_torch: str | None, extra: str, what: str
) -> None:
    def find_spec(name: str) -> None:
        if what == "no nvidia at all":
            raise ModuleNotFoundError("No module named 'nvidia'")

    here(cuda_of_torch, None)
    monkeypatch.setattr(dali_install, "find_spec", find_spec)
    says = rf"^--loader dali: NVIDIA DALI is not installed\. Type: pip install 'gesture-clips\[{extra}\]', or take --loader webdataset\.$"
    with pytest.raises(InputError, match=says):
        open_source(jpegs, "train", "dali")


def test_the_extras_that_errors_name_are_those_of_setup_cfg() -> None:
    text = (Path(__file__).parents[1] / "setup.cfg").read_text()
    for major, extra in dali_install.EXTRAS.items():
        assert f"\n{extra} =\n    {dali_install.WHEELS[major]}" in text


@pytest.mark.parametrize(
    ("cuda_of_torch", "driver", "wheels", "says"),
    [
        ("13.0", 13, [CUDA12], rf"{CUDA12} is installed, but torch is built for CUDA 13\.0\. Type: pip uninstall {CUDA12}\. Type: .*\[dali-cuda13\]'"),
        ("12.8", 13, [CUDA13], rf"{CUDA13} is installed, but torch is built for CUDA 12\.8\. Type: pip uninstall {CUDA13}\. Type: .*\[dali\]'"),
        ("12.8", 12, [CUDA12, CUDA13], r"write over each other\. Remove both\. Type: pip install 'gesture-clips\[dali\]'"),
        ("13.0", 12, [CUDA13], rf"driver is for CUDA 12; {CUDA13} needs 13\. With a torch built for CUDA 12 take {CUDA12}, or "),
        ("11.8", 11, [CUDA12], rf"driver is for CUDA 11; {CUDA12} needs 12\. Ask who runs this machine for a newer driver, or take --loader web"),
    ],
)
def test_a_wheel_for_another_cuda_and_a_driver_too_old_are_errors_that_say_what_to_take(
    here: Callable[..., None], cuda_of_torch: str, driver: int, wheels: list[str], says: str
) -> None:
    here(cuda_of_torch, driver, *wheels)
    with pytest.raises(InputError, match=f"^--loader dali: .*{says}"):
        check_cuda()


@pytest.mark.parametrize(
    ("cuda_of_torch", "driver", "wheel"),
    [("12.8", 12, CUDA12), ("12.8", 13, CUDA12), ("13.0", 13, CUDA13), ("12.4", None, CUDA12)],
)
def test_a_wheel_that_fits_torch_and_driver_is_no_error(here: Callable[..., None], cuda_of_torch: str, driver: int | None, wheel: str) -> None:
    here(cuda_of_torch, driver, wheel)
    check_cuda()
    assert wanted_cuda() == int(cuda_of_torch[:2])


def test_a_dali_that_cannot_be_imported_is_an_error_with_its_reason(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_install, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(InputError, match=r"^--loader dali: NVIDIA DALI is installed but cannot be imported \(.*nvidia.dali.*\)"), opened(jpegs, "dali"):
        pass


def test_dali_is_imported_only_when_it_is_chosen(jpegs: Path) -> None:
    code = "import sys; from pathlib import Path; from loaders.source import open_source; from loaders import stream\n"
    code += f"open_source(Path({str(jpegs)!r}), 'train').close(); print([name for name in sys.modules if 'dali' in name])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_looking_for_the_wheel_imports_neither_dali_nor_torch() -> None:
    """The decoding process beside the training looks for it too."""
    code = "import sys, loaders.dali; from loaders.dali_install import check_wheel\ntry: check_wheel()\nexcept Exception: sys.modules.pop('torch', None)\n"
    code += "print(sorted({'torch', 'nvidia.dali'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Library:
    """nvJPEG of a GPU with so many engines; `fails` names the function that does."""

    def __init__(self, engines: int, fails: str = "") -> None:
        self.engines, self.fails, self.open_handles = engines, fails, 0

    def nvjpegCreateSimple(self, handle: Any) -> int:  # Any: ctypes' references
        self.open_handles += self.fails != "create"
        return int(self.fails == "create")

    def nvjpegGetHardwareDecoderInfo(self, handle: Any, engines: Any, cores: Any) -> int:  # Any: ctypes' references
        engines._obj.value, cores._obj.value = self.engines, 4
        return int(self.fails == "tell")

    def nvjpegDestroy(self, handle: Any) -> int:  # Any: ctypes' references
        self.open_handles -= 1
        return 0


@pytest.mark.parametrize(
    ("library", "found", "says"),
    [
        (Library(7), (7, 4), "7 JPEG engines of 4 cores on H200 take 0.65 of the frames"),
        (Library(0), (0, 4), "H200 has no engine for JPEG: DALI decodes on its cores and, in part, on the host's"),
        (Library(3, "tell"), (0, 0), "H200 has no engine for JPEG"),
        (Library(3, "create"), None, "does not tell whether H200 has an engine"),
        (None, None, "does not tell whether H200 has an engine"),
        (object(), None, "does not tell whether H200 has an engine"),
    ],
)
def test_what_nvjpeg_tells_of_its_engines_is_said_once_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, library: Any, found: tuple[int, int] | None, says: str
) -> None:
    def load(path: str) -> Any:  # Any: what stands for a C library
        if library is None:
            raise OSError("libnvjpeg.so.12: cannot open shared object file")
        return library

    monkeypatch.setattr("ctypes.CDLL", load)
    assert jpeg_engines() == found
    if isinstance(library, Library):
        assert library.open_handles == 0
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    tell_engine.cache_clear()
    with caplog.at_level("INFO"):
        tell_engine(torch.device("cuda", 0), 0.65)
        tell_engine(torch.device("cuda", 0), 0.65)
    (line,) = caplog.messages
    assert line.startswith("--loader dali: ") and says in line


def test_the_share_of_the_engine_is_kept_when_a_run_goes_on(tmp_path: Path) -> None:
    stored = {"loader": "dali", "hw_decoder_load": 0.65}
    assert "loader" in FREE
    check_same(tmp_path, stored, dict(stored), FREE)
    with pytest.raises(InputError, match=r"--hw-decoder-load was 0\.65, now 0\.9"):
        check_same(tmp_path, stored, {**stored, "hw_decoder_load": 0.9}, FREE)


def test_a_driver_that_cannot_be_asked_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert dali_install.driver_cuda() is None


def test_the_wheel_is_looked_for_on_this_machine_without_an_accident() -> None:
    try:
        check_wheel()
    except InputError as error:
        assert "is not installed" in str(error)
