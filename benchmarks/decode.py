"""Which decoder on which node: clips and frames a second, CPU time and memory of each one at hand, from memory, without storage.

    clips -> encoded anew -> each setting: open and calibrate every way -> rounds of all ways, interleaved -> results -> table, plot, a sentence

The first value of each flag is the base; the others are measured one at a time beside it, so that a sweep takes minutes and not hours. Every
measurement is written when it is made: a run that is killed keeps what it has, and the last line of a name counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch

from clips.clip import ClipSpec
from clips.environment import allocated_cpus
from clips.errors import InputError
from clips.synthetic import DEFAULT_SPEC
from loaders.dali_install import jpeg_engines
from loaders.stream import HW_DECODER_LOAD

from .decode_report import report
from .decode_ways import WITH_SHARE, Buffers, Decoder, MemorySource, Shown, make_up, opener, read_clips, why_not
from .result import Result, read_results, result, write_results

if TYPE_CHECKING:
    from .decode_ways import Way

BASE_THREADS = 4  # at most: what a node has for each of its GPUs
CPU_BATCH, GPU_BATCH = 8, 32
LEAST_BATCHES = 3  # of a measurement
QUICK_SPEC, QUICK_CLIPS = ClipSpec(10, 96, 96), 3
FAILURES = (RuntimeError, InputError, AttributeError, TypeError)  # the last two: of a library that is otherwise than was thought
IN_MEMORY = "none: from memory"


@dataclass(frozen=True)
class DecodeConfig:
    """Clips and frames a second, CPU time, host CPU and GPU memory of every decoder at hand.

    A flag's first value is the base; the others are measured one at a time beside it.
    """

    dataset_home: Path | None = None
    """Packed clips (or npz), encoded anew in memory; default: made-up ones."""
    split: str = "train"
    """Which split to take clips from."""
    clips: int = 16
    """How many, spread over the split: all are kept in memory."""
    decoders: tuple[Decoder, ...] = get_args(Decoder)
    """Which of them; those not at hand are named. None: only the table and the plot of --json."""
    frames: tuple[int, ...] = (16, 39)
    """Frames of a clip."""
    quality: tuple[int, ...] = (90, 75, 95)
    """JPEG's quality."""
    store_size: tuple[int, ...] = (320, 256)
    """Pixels of a stored frame's shorter side."""
    size: int = 224
    """Pixels of a finished frame."""
    threads: tuple[int, ...] | None = None
    """Decoding threads; default: up to 4 as the base, then powers of two up to the cores that may be used."""
    hw_decoder_load: tuple[float, ...] = (HW_DECODER_LOAD, 0.0, 0.12, 0.25, 0.5, 0.9, 1.0)
    """The JPEG engine's share of the frames, for dali-mixed."""
    batch: int | None = None
    """Clips decoded together; default: 8, on a GPU 32."""
    seconds: float = 1.0
    """Of a measurement, about."""
    rounds: int = 5
    """Measurements of each way, interleaved."""
    minutes: float = 8.0
    """What does not fit is left out and named."""
    quick: bool = False
    """Small made-up clips and short measurements: whether it runs, not how fast."""
    json: Path | None = None
    """Append the results here, each when it is measured; table and plot show all of the file."""
    plot: Path | None = None
    """The PNG to write."""

    def __post_init__(self) -> None:
        for flag in ("clips", "frames", "quality", "store_size", "size", "threads", "batch", "rounds"):
            values = getattr(self, flag)
            if values is not None and min(values if isinstance(values, tuple) else (values,), default=0) < 1:
                raise InputError(f"--{flag.replace('_', '-')} {_spelled(values)}: expected at least 1.")
        if not self.hw_decoder_load or not all(0 <= share <= 1 for share in self.hw_decoder_load):
            raise InputError(f"--hw-decoder-load {_spelled(self.hw_decoder_load)}: expected 0 … 1.")
        if not self.seconds > 0 or not self.minutes > 0:
            raise InputError(f"--seconds {self.seconds} --minutes {self.minutes}: expected more than 0.")
        if not self.decoders and self.json is None:
            raise InputError("--decoders: none given. Name some, or the results to show with --json.")


class Setting(NamedTuple):
    """What is decoded."""

    frames: int
    quality: int
    store_size: int


class Kind(NamedTuple):
    """What decodes it; only one decoder has a share."""

    decoder: Decoder
    threads: int
    share: float | None


@dataclass
class Measured:
    """A decoder with its threads and share, and what was measured of it: one value a round."""

    name: str
    batch: int  # clips
    facts: dict[str, Any]  # Any: JSON
    batches: int = LEAST_BATCHES  # of a measurement, after the first, which starts the clock
    way: Way = field(init=False)
    clips_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    host_percent: list[float] = field(default_factory=list)

    def open(self, start: Callable[[], Way], seconds: float) -> None:
        """Starts it, warms it up and finds how many batches take about that long; closed again where it fails."""
        self.way = start()
        try:
            for _ in self.way.run(2):
                pass
            self.measure()
        except BaseException:
            self.way.close()
            raise
        self.batches = max(LEAST_BATCHES, round(seconds * self.clips_per_s.pop() / self.batch))
        self.cpu_ms.clear()
        self.host_percent.clear()

    def measure(self) -> None:
        """Speed from the first batch to the last, CPU time from nothing to nothing."""
        cpu_s, begin = time.process_time(), time.perf_counter()
        batches = self.way.run(self.batches + 1)
        next(batches)
        first = time.perf_counter()
        for _ in batches:
            pass
        end = time.perf_counter()
        cpu_s = time.process_time() - cpu_s
        self.clips_per_s.append(self.batches * self.batch / (end - first))
        self.cpu_ms.append(1000 * cpu_s / ((self.batches + 1) * self.batch))
        self.host_percent.append(100 * cpu_s / (end - begin))

    def results(self) -> list[Result]:
        facts = self.facts | {"batches": self.batches + 1, "load": round(os.getloadavg()[0], 1)}  # the load of this process too
        of = {"speed": ("clips/s", self.clips_per_s), "cpu": ("CPU ms/clip", self.cpu_ms), "host": ("% of a core", self.host_percent)}
        return [result(f"{self.name}/{kind}", unit, values, facts) for kind, (unit, values) in of.items()]


class Book:
    """The results so far, written at once; at the end each name is left with its last line."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._found = path, dict[str, Result]()
        self._before = path.read_bytes() if path and path.exists() else b""

    def write(self, results: list[Result]) -> None:
        self._found |= {one.name: one for one in results}
        if self._path:
            write_results(self._path, results, IN_MEMORY)

    def end(self) -> list[Result]:
        if self._path and self._found:
            part = self._path.with_name(f"{self._path.name}.part")
            part.write_bytes(self._before)
            write_results(part, list(self._found.values()), IN_MEMORY)
            part.replace(self._path)
        return list(self._found.values())


def bench_decode(config: DecodeConfig) -> list[Result]:
    """Prints a table and which decoder to take, and gives the results."""
    config = _quick(config) if config.quick else config
    missing: dict[str, str] = {decoder: reason for decoder in config.decoders if (reason := why_not(decoder))}
    for decoder, reason in missing.items():
        _say(f"{decoder}: not measured, {reason}")
    decoders = [decoder for decoder in config.decoders if decoder not in missing]
    book, before = Book(config.json), torch.get_num_threads()
    torch.set_num_threads(1)  # what the main thread does beside decoding threads, as beside a training step
    try:
        if decoders:
            _measure(config, decoders, book)
    finally:
        torch.set_num_threads(before)
        results = book.end()
    shown = read_results(config.json) if config.json and config.json.exists() else {one.name: one for one in results}
    report(shown, missing, config.plot)
    return results


def _quick(config: DecodeConfig) -> DecodeConfig:
    short: dict[str, Any] = {
        "clips": min(config.clips, QUICK_CLIPS),
        "seconds": min(config.seconds, 0.02),
        "rounds": min(config.rounds, 2),
        "batch": config.batch or 2,
    }
    if config.dataset_home is None:
        short |= {"frames": (4, 8), "quality": config.quality[:2], "store_size": (QUICK_SPEC.height, 64), "size": 48}
    return replace(config, **short)


def _measure(config: DecodeConfig, decoders: list[Decoder], book: Book) -> None:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    engines = jpeg_engines() if gpu else None
    what = f"{engines[0]} JPEG engines of {engines[1]} cores, as nvJPEG says" if engines else "nvJPEG tells of no JPEG engine" if gpu else "no GPU"
    _say(f"{gpu or 'a CPU'}, {allocated_cpus()} cores; {what}")
    clips, batch = _clips(config), config.batch or (GPU_BATCH if gpu else CPU_BATCH)
    facts: dict[str, Any] = {"clips": len(clips), "source": "made up" if config.dataset_home is None else "encoded anew", "batch": batch}
    facts |= {"cores": allocated_cpus(), "gpu": gpu, "engines": engines}
    session = Session(config, book, clips, batch, facts, time.perf_counter() + 60 * config.minutes)
    for setting in settings_of(config):
        kinds = kinds_of(config, decoders, setting)
        ways: list[Measured] = []
        buffers = Buffers(gpu is not None)
        try:
            for kind in kinds:
                if opened := session.opened(setting, kind, buffers):
                    ways.append(opened)
            session.rounds(ways)
        finally:
            for one in ways:
                one.way.close()


def _clips(config: DecodeConfig) -> Shown:
    if config.dataset_home is None:
        spec = QUICK_SPEC if config.quick else DEFAULT_SPEC
        _say(f"no --dataset-home: {config.clips} made-up clips of {spec}, which compress otherwise than real ones")
        return make_up(config.clips, spec)
    clips = read_clips(config.dataset_home, config.split, config.clips)
    _say(f"{len(clips)} clips of {config.dataset_home}, decoded and encoded anew for each quality and size: for speed a second loss of quality does not matter")
    return clips


def settings_of(config: DecodeConfig) -> list[Setting]:
    """The base, then every other value one at a time."""
    base = Setting(config.frames[0], config.quality[0], config.store_size[0])
    found = [base]
    for name, values in (("frames", config.frames), ("quality", config.quality), ("store_size", config.store_size)):
        found += [base._replace(**{name: value}) for value in values[1:]]
    return found


def kinds_of(config: DecodeConfig, decoders: list[Decoder], setting: Setting) -> list[Kind]:
    """Each decoder with the base's threads and share; at the base setting also with every other one at a time. JPEG's quality is nothing to zstd."""
    threads, found = config.threads or default_threads(allocated_cpus()), list[Kind]()
    base = settings_of(config)[0]
    for decoder in decoders:
        shares: tuple[float | None, ...] = config.hw_decoder_load if decoder == WITH_SHARE else (None,)
        if setting == base:
            found += [Kind(decoder, threads[0], share) for share in shares] + [Kind(decoder, number, shares[0]) for number in threads[1:]]
        elif setting.quality == base.quality or not decoder.startswith("zstd"):
            found.append(Kind(decoder, threads[0], shares[0]))
    return found


def default_threads(cores: int) -> tuple[int, ...]:
    """The base first: 4, or what there is."""
    powers = [2**power for power in range(cores.bit_length())]
    base = max(power for power in powers if power <= BASE_THREADS)
    return (base, *sorted({*powers, cores} - {base}))


@dataclass
class Session:
    """What all settings share."""

    config: DecodeConfig
    book: Book
    clips: Shown
    batch: int
    facts: dict[str, Any]  # Any: JSON
    end_s: float
    sources: dict[tuple[int | None, int], MemorySource] = field(default_factory=dict)

    def opened(self, setting: Setting, kind: Kind, buffers: Buffers) -> Measured | None:
        """A way that is warm and knows how many batches make a measurement; one that fails is named."""
        quality = None if kind.decoder.startswith("zstd") else setting.quality
        name = f"decode/{setting.frames}x{setting.store_size}/{'raw' if quality is None else f'q{quality}'}/{kind.decoder}/{kind.threads}_threads"
        name += "" if kind.share is None else f"/share_{kind.share:g}"
        if self._is_over(name):
            return None
        source = self._source(setting.store_size, quality)
        spec = ClipSpec(setting.frames, self.config.size, self.config.size)
        told = {"frames": setting.frames, "quality": quality, "stored": [source.stored.height, source.stored.width], "size": self.config.size}
        one = Measured(name, self.batch, told | kind._asdict() | {"frame_bytes": round(source.frame_bytes)} | self.facts)
        free_bytes = _free_gpu_bytes()
        try:
            one.open(opener(kind.decoder, source, spec, self.batch, kind.threads, kind.share, buffers), self.config.seconds)
        except FAILURES as error:
            _say_failed(name, error)
            return None
        if free_bytes is not None and (kind.decoder.endswith(("-gpu", "-mixed")) or kind.decoder.startswith("nvimgcodec")):
            used = free_bytes - torch.cuda.mem_get_info(0)[0]
            self.book.write([result(f"{name}/gpu_memory", "GiB", [used / 2**30], one.facts)])
        return one

    def _source(self, store_size: int, quality: int | None) -> MemorySource:
        """Encoded once."""
        if (quality, store_size) not in self.sources:
            self.sources[quality, store_size] = MemorySource(self.clips, store_size, quality)
        return self.sources[quality, store_size]

    def rounds(self, ways: list[Measured]) -> None:
        """All ways in turn, every second round backwards."""
        for number in range(self.config.rounds):
            for one in list(ways)[:: -1 if number % 2 else 1]:
                if self._is_over(f"{one.name}: round {number + 1}"):
                    continue
                try:
                    one.measure()
                except FAILURES as error:
                    _say_failed(one.name, error)
                    ways.remove(one)
                    one.way.close()
                    continue
                self.book.write(one.results())
            _say(f"{len(ways)} ways: round {number + 1} of {self.config.rounds} done")

    def _is_over(self, what: str) -> bool:
        if is_over := time.perf_counter() > self.end_s:
            _say(f"{what}: left out, --minutes {self.config.minutes:g} are over")
        return is_over


def _free_gpu_bytes() -> int | None:
    """When torch has let go what it does not need."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(0)[0]


def _say_failed(name: str, error: Exception) -> None:
    _say(f"{name}: failed, {type(error).__name__}: {[*str(error).strip().splitlines(), ''][0]}")


def _spelled(values: Any) -> str:  # Any: a number or several
    return " ".join(map(str, values)) if isinstance(values, tuple) else str(values)


def _say(line: str) -> None:
    print(line, flush=True)
