"""Clips per second of the training step alone, on one batch that lies on the device: ours, eager and compiled, and plain transformers beside it.

    part = model x geometry: build -> find each side's micro-batch -> rounds of all ways, interleaved -> results

Every measurement is written when it is made, so a run that is killed keeps what it has: the last line of a name counts.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from clips.clip import ClipSpec
from clips.errors import InputError
from training.distributed import Group
from training.precision import AUTOCAST_DTYPES, Precision

from .result import Result, as_word, cell, result, table, write_results

if TYPE_CHECKING:  # transformers and torch.compile cost seconds: they are imported when this benchmark runs
    from models.classifier import ClipClassifier

    from .step_clock import Way
    from .step_sides import Side

Name = Literal["videomae-base", "timesformer-base", "videomae-tiny", "timesformer-tiny"]
Geometry = Literal["native", "full"]
Variant = Literal["eager", "compiled", "plain", "plain-compiled"]
GPU_BATCH, CPU_BATCH = 64, 1  # train.py's --batch-size; what fits anywhere
MEASURING = 0.7  # share of the time after compiling that goes into measurements; the rest is for building, searching and warming up
COMPILE_S = 100  # what it is taken to need; not begun with less than this left
AIM_MFU, AIM_OVER_PLAIN, AIM_PART, AIM_GPU = 0.45, 1.3, "videomae-base/native", "H200"


@dataclass(frozen=True)
class StepConfig:
    """Clips a second of the training step on one cached batch, without a loader: our models beside plain transformers, with random weights."""

    model_name: tuple[Name, ...] = ("videomae-base", "timesformer-base")
    """ViT-B in the published architectures, or the small models for tests; nothing is downloaded."""
    geometry: tuple[Geometry, ...] = ("native", "full")
    """native: the published frames and size; full: 39 frames of 320 pixels."""
    variant: tuple[Variant, ...] = ("eager", "plain", "compiled")
    """eager and compiled are ours; plain is transformers' own model in a plain loop, plain-compiled the same compiled."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """As in training: bf16 where the GPU has it, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    attention: Literal["auto", "flash", "cudnn", "efficient"] = "auto"
    """The kernel of scaled_dot_product_attention in all that is measured; auto is torch's choice."""
    batch_size: int | None = None
    """Micro-batches are searched among its divisors; default: 64 as in training, 1 on a CPU."""
    micro_batch: int | None = None
    """Clips of every step, without a search."""
    warm_up: int = 10
    """Steps before the first measurement of each way; fewer, 2 at least, where --minutes ask for it."""
    steps: int = 30
    """Steps of a measurement; fewer, 5 at least, where --minutes ask for it."""
    rounds: int = 3
    """Measurements of each way, interleaved."""
    minutes: float = 8.0
    """What does not fit is left out and named."""
    quick: bool = False
    """Small models and few steps: whether it runs, not how fast; on a CPU compiled only by name, for real compilation takes minutes there."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("--json",))] = None
    """Append the results here, each when it is measured."""

    def __post_init__(self) -> None:
        for flag in ("batch_size", "micro_batch", "warm_up", "steps", "rounds"):
            if (value := getattr(self, flag)) is not None and value < 1:
                raise InputError(f"--{flag.replace('_', '-')} {value}: expected at least 1.")
        if not self.minutes > 0:
            raise InputError(f"--minutes {self.minutes}: expected more than 0.")


@dataclass(frozen=True)
class Row:
    """One way of one part, measured; lists have one value a round. MFU is empty and memory None on a CPU, CPU time empty on a GPU."""

    part: str  # model/geometry
    clip: str
    way: str
    size: int  # clips at once
    clips_per_s: list[float]
    step_ms: list[float]
    cpu_ms: list[float]
    mfu: list[float]
    memory_gib: float | None
    estimated_gib: float
    first_s: float
    over_plain: list[float]
    facts: dict[str, Any]  # Any: JSON, what goes into the results

    def results(self) -> list[Result]:
        """All but the speed, which was written when it was measured."""
        kinds = {"step": ("ms", self.step_ms), "mfu": ("share", self.mfu), "over_plain": ("ratio", self.over_plain), "first_step": ("s", [self.first_s])}
        kinds["cpu"] = ("CPU ms/step", self.cpu_ms)
        kinds["memory"] = ("GiB", [self.memory_gib] if self.memory_gib is not None else [])
        return [result(f"step/{self.part}/{as_word(self.way)}/{kind}", unit, values, self.facts) for kind, (unit, values) in kinds.items() if values]


@dataclass
class Session:
    """What all parts share, and what has been found so far."""

    config: StepConfig
    group: Group
    precision: Precision
    stored: ClipSpec
    batch_size: int
    begin_s: float = field(default_factory=time.perf_counter)
    rows: list[Row] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    num_failed: int = 0
    num_parts: int = 1  # not yet measured

    @property
    def numbers(self) -> Literal["fp32", "bf16"]:
        """What the activations' size is reckoned with."""
        return "fp32" if self.precision.mode == "fp32" else "bf16"

    @property
    def left_s(self) -> float:
        """Seconds of --minutes."""
        return self.begin_s + 60 * self.config.minutes - time.perf_counter()

    def write(self, results: Sequence[Result]) -> None:
        self.results += results
        if self.config.output:
            write_results(self.config.output, results, "none")


def bench_step(config: StepConfig) -> list[Result]:
    """Prints a table and how the aims stand, and gives the results; raises InputError at the end when something could not be measured."""
    from .step_clock import attention, matmul_tflops

    session = _session(_quick(config) if config.quick else config)
    config, device = session.config, session.group.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    _say(f"random weights, nothing downloaded; one cached batch, no loader; {session.precision.mode} on {gpu or f'a CPU, {torch.get_num_threads()} threads'}")
    ceiling = matmul_tflops(device, AUTOCAST_DTYPES.get(session.precision.mode, torch.float32), config.rounds)
    _say(f"a product of large random matrices reaches {cell(ceiling, 1 if max(ceiling) > 10 else 3)} TFLOP/s")
    session.write([result("step/matmul", "TFLOP/s", ceiling, {"precision": session.precision.mode})])
    parts = list(product(config.model_name, config.geometry))
    for number, (name, geometry) in enumerate(parts):
        session.num_parts = len(parts) - number
        if session.left_s <= 0:
            _say(f"{name}/{geometry}: left out, --minutes {config.minutes:g} are over")
            continue
        with attention(config.attention):
            _part(session, name, geometry)
    print(_table(session.rows))
    print(verdict(session.rows, gpu))
    if session.num_failed:
        raise InputError(f"{session.num_failed} failures, which stand above: not everything could be measured.")
    return session.results


def _session(config: StepConfig) -> Session:
    from .step_sides import QUICK_STORED, STORED

    is_cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    if is_cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here. Leave it out to measure on the CPU.")
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    batch_size = config.micro_batch or config.batch_size or (GPU_BATCH if is_cuda else CPU_BATCH)
    stored = QUICK_STORED if config.quick else STORED
    return Session(config, Group(0, 1, 0, device, "single"), Precision(config.precision, device), stored, batch_size)


def _quick(config: StepConfig) -> StepConfig:
    names: Any = tuple(name.replace("base", "tiny") for name in config.model_name)  # Any: of the literals above
    few = {"warm_up": min(config.warm_up, 2), "steps": min(config.steps, 3), "rounds": min(config.rounds, 2), "batch_size": config.batch_size or 2}
    return replace(config, model_name=names, **few)  # type: ignore[arg-type]  # all of them integers


def _part(session: Session, name: str, geometry: Geometry) -> None:
    """Measures all ways of a model at a geometry; a way that fails is named, and the others go on."""
    from models.costs import estimate

    from .step_sides import Ours, Plain, random_model

    device, part = session.group.device, f"{name}/{geometry}"
    model = random_model(name, geometry, session.stored)
    _say(f"{part}: {model.spec} clips; {estimate(model, None, 1, session.numbers).describe()}")
    wanted = {"plain" if variant.startswith("plain") else "ours" for variant in session.config.variant}
    made: dict[str, Any] = {"plain": Plain, "ours": Ours}  # plain first: it copies the weights
    sides: dict[str, Side] = {side: made[side](model, session.precision) for side in made if side in wanted}
    ways = _ways(session, part, sides)
    _rounds(session, part, ways)
    plain = next((way for way in ways if way.name == "plain"), None)
    for way in ways:
        session.rows.append(_row(session, part, model, way, plain))
        session.write(session.rows[-1].results())
    del model, sides, ways, plain
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        with suppress(RuntimeError):  # of a kernel that failed before
            torch.cuda.empty_cache()


def _row(session: Session, part: str, model: ClipClassifier, way: Way, plain: Way | None) -> Row:
    from models.costs import estimate, mfu, peak_flops

    device = session.group.device
    cost = estimate(model, None, way.size, session.numbers)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    is_fair = plain is not None and plain is not way and way.size == plain.size
    return Row(
        part=part,
        clip=str(model.spec),
        way=way.name,
        size=way.size,
        clips_per_s=way.clips_per_s,
        step_ms=way.step_ms,
        cpu_ms=way.cpu_ms,
        mfu=[share for speed in way.clips_per_s if (share := mfu(speed, cost, peak)) is not None],
        memory_gib=None if way.peak_bytes is None else way.peak_bytes / 2**30,
        estimated_gib=cost.step_bytes(model.checkpointed) / 2**30,
        first_s=way.first_s or 0.0,
        over_plain=[a / b for a, b in zip(way.clips_per_s, plain.clips_per_s, strict=False)] if plain and is_fair else [],
        facts=_facts(session, way) | {"checkpointed": model.checkpointed},
    )


def _ways(session: Session, part: str, sides: Mapping[str, Side]) -> list[Way]:
    """Every variant at the largest micro-batch that all sides take, and again at its own where that is larger."""
    from .step_clock import Way, sizes

    fits: dict[str, int] = {}
    for name, side in sides.items():
        try:
            fits[name] = session.config.micro_batch or side.largest(session.batch_size, session.group)
        except InputError:
            _say(f"{part}: not even one clip fits into this GPU for {name}; left out")
        except RuntimeError as error:
            _say_failed(session, f"{part}, {name}, looking for the micro-batch", error)
    if not fits:
        return []
    same, larger = sizes(fits)
    of = {variant: "plain" if variant.startswith("plain") else "ours" for variant in session.config.variant}
    is_trial = session.config.quick and session.group.device.type == "cpu"
    backend = {variant: ("eager" if is_trial else "inductor") if "compiled" in variant else None for variant in of}
    ways = [Way(variant, sides[side], same, backend[variant]) for variant, side in of.items() if side in fits]
    return ways + [Way(f"{variant}, at its best", sides[side], larger[side], backend[variant]) for variant, side in of.items() if side in larger]


def _rounds(session: Session, part: str, ways: list[Way]) -> None:
    """Measures the ways in turn, every second round backwards, and drops those that fail."""
    config, device = session.config, session.group.device
    time_s = session.left_s / session.num_parts - COMPILE_S * sum(way.backend == "inductor" for way in ways)
    limit_s = MEASURING * time_s / (config.rounds * max(len(ways), 1))
    for number in range(config.rounds):
        for way in ways[:: -1 if number % 2 else 1]:
            if session.left_s < (COMPILE_S if way.backend == "inductor" and way.first_s is None else 0):
                _say(f"{part}, {way.name}: round {number + 1} left out, {max(session.left_s, 0):.0f} s of --minutes {config.minutes:g} are left")
                continue
            try:
                way.measure(device, config.warm_up, config.steps, limit_s)
            except torch.cuda.OutOfMemoryError:
                ways.remove(way)
                _say(f"{part}, {way.name}: {way.size} clips at once do not fit into this GPU's memory; left out")
                way.side.optimizer.zero_grad(set_to_none=True)
                way.side.optimizer.state.clear()  # it may be half made
                continue
            except RuntimeError as error:  # compilation, a kernel that is not there, a loss that is not finite
                ways.remove(way)
                _say_failed(session, f"{part}, {way.name}", error)
                continue
            speed = result(f"step/{part}/{as_word(way.name)}/speed", "clips/s", way.clips_per_s, _facts(session, way))
            session.write([speed])
            _say(f"{part}, {way.name}, {way.size} at once: {way.clips_per_s[-1]:.4g} clips/s, {way.step_ms[-1]:.0f} ms, {_started(way)}round {number + 1}")
    ways[:] = [way for way in ways if way.step_ms]


def _started(way: Way) -> str:
    """What the first step of a way tells, once."""
    if len(way.step_ms) > 1:
        return ""
    compiled = f", {way.graphs} graphs, {way.breaks} breaks by {way.backend}" if way.backend else ""
    return f"first step {way.first_s:.1f} s{compiled}, "


def _say_failed(session: Session, what: str, error: RuntimeError) -> None:
    """A line on an error that is no lack of memory; it makes the exit code."""
    session.num_failed += 1
    _say(f"{what}: failed, {type(error).__name__}: {[*str(error).strip().splitlines(), ''][0]}")


def _facts(session: Session, way: Way) -> dict[str, Any]:
    """What a speed depends on, for its result."""
    facts = {"micro_batch": way.size, "precision": session.precision.mode, "attention": session.config.attention, "steps": way.steps}
    facts |= {"warm_up": session.config.warm_up, "slowest_step_ms": round(way.slowest_ms, 3), "weights": "random", "threads": torch.get_num_threads()}
    facts["load"] = round(os.getloadavg()[0], 1)  # of the last minute, this process's own threads included: what others took
    return facts | ({"graphs": way.graphs, "graph_breaks": way.breaks} if way.backend else {})


def _table(rows: Sequence[Row]) -> str:
    header = ["model and clips", "step", "at once", "clips/s", "step, ms", "CPU ms", "MFU, %", "memory, GiB", "estimated", "first step, s", "over plain"]
    cells = [
        [
            *(f"{row.part} {row.clip}", row.way, str(row.size)),
            cell(row.clips_per_s, 1 if max(row.clips_per_s) > 10 else 3),
            cell(row.step_ms, 0),
            cell(row.cpu_ms, 0) if row.cpu_ms else "n/a",
            cell([100 * share for share in row.mfu], 1) if row.mfu else "n/a",
            f"{row.memory_gib:.1f}" if row.memory_gib is not None else "n/a",
            *(f"{row.estimated_gib:.1f}", f"{row.first_s:.1f}"),
            cell(row.over_plain, 2) if row.over_plain else "-",
        ]
        for row in rows
    ]
    return table(header, cells)


def verdict(rows: Sequence[Row], gpu: str | None) -> str:
    """How the aims stand, where a GPU ran."""
    if gpu is None:
        return f"The aims ({100 * AIM_MFU:.0f} % MFU, {AIM_OVER_PLAIN} x plain transformers eager) are an {AIM_GPU}'s: a CPU's numbers say nothing about them."
    medians = {(row.part, row.way): result("", "", row.mfu).value for row in rows if row.part == AIM_PART and row.mfu and not row.way.startswith("plain")}
    if not medians:
        share = f"{AIM_PART} has no MFU on {gpu}"
    else:
        (_, way), value = max(medians.items(), key=lambda item: item[1])
        where = "" if AIM_GPU in gpu else f", which is no {AIM_GPU}"
        share = f"{AIM_PART} {way} comes to {100 * value:.1f} % MFU on {gpu}{where} (aim {100 * AIM_MFU:.0f} %: {_stands(value >= AIM_MFU)})"
    ratios = [(f"{row.part} {row.way}", result("", "", row.over_plain).value) for row in rows if row.over_plain and not row.way.startswith("plain")]
    over = ", ".join(f"{name} {value:.2f} ({_stands(value >= AIM_OVER_PLAIN)})" for name, value in ratios) or "not measured"
    return f"{share}; over plain transformers eager at the same micro-batch, aim {AIM_OVER_PLAIN}: {over}."


def _stands(is_reached: bool) -> str:
    return "reached" if is_reached else "missed"


def _say(line: str) -> None:
    print(line, flush=True)
