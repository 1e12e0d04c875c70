"""The benchmark of the training step measures the same work on both sides, keeps what it has, and claims only what it may; never how long it took."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import step_clock
from benchmarks.result import read_results
from benchmarks.step import Geometry, Row, StepConfig, bench_step, verdict
from benchmarks.step_clock import Way, matmul_tflops, sizes, step_times_ms
from benchmarks.step_sides import QUICK_STORED, Ours, Plain, Side, cached_batch, random_model
from clips.errors import InputError
from loaders.batch import Batch
from training.precision import Precision

CPU = torch.device("cpu")
TINY: Any = ("videomae-tiny", "timesformer-tiny")
KINDS = {"speed": "clips/s", "step": "ms", "cpu": "CPU ms/step", "first_step": "s"}
SMALL: dict[str, Any] = {"quick": True, "steps": 1, "rounds": 2, "warm_up": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:  # Any: a generator
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def speeds(path: Path) -> list[str]:
    """The names of all speeds, in the order in which they were written."""
    return [line["name"] for line in map(json.loads, path.read_text().splitlines()) if line["name"].endswith("/speed")]


@pytest.mark.slow
def test_a_quick_run_measures_all_ways_of_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.jsonl"
    found = {one.name: one for one in bench_step(StepConfig(**SMALL, output=path))}
    ways = ("eager", "plain", "compiled")
    starts = [f"step/{name}/{geometry}/{way}" for name in TINY for geometry in ("native", "full") for way in ways]
    expected = {f"{start}/{kind}": unit for start in starts for kind, unit in KINDS.items()}
    expected |= {f"{start}/over_plain": "ratio" for start in starts if not start.endswith("/plain")}
    assert {name: one.unit for name, one in found.items()} == {**expected, "step/matmul": "TFLOP/s"}
    assert read_results(path) == found
    for one in found.values():
        assert one.n == (1 if one.name.endswith("first_step") else 2)
        assert 0 < one.spread[0] <= one.value <= one.spread[1] and math.isfinite(one.value)
    for name, one in found.items():
        if name.endswith("/compiled/speed"):
            assert (one.config["graphs"], one.config["graph_breaks"]) == (1, 0)
        if name.endswith("/speed"):
            least, greatest = found[name.replace("speed", "step")].spread
            assert one.spread == pytest.approx((2 * 1000 / greatest, 2 * 1000 / least))  # 2 clips at once
    said = capsys.readouterr().out
    assert "random weights" in said and "a CPU's numbers say nothing about them" in said
    assert "reached" not in said and "missed" not in said


@pytest.mark.parametrize("geometry", ["native", "full"])
@pytest.mark.parametrize("name", TINY)
def test_both_sides_do_the_same_work(name: str, geometry: Geometry) -> None:
    """Losses of three steps, and the weights after them: forward, backward, clipping and the optimiser are the same."""
    model = random_model(name, geometry, QUICK_STORED)
    precision = Precision("fp32", CPU)
    sides: dict[str, Side] = {"plain": Plain(model, precision), "ours": Ours(model, precision)}
    before = model.get_parameter("classifier.weight").detach().clone()
    losses: dict[str, list[Any]] = {side: [] for side in sides}
    video = {side: one.batch(2).video for side, one in sides.items()}
    video["plain"] = video["ours"].permute(0, 1, 4, 2, 3)
    for side, one in sides.items():
        batch = cached_batch((2, *model.spec.video_shape), CPU)
        batch = Batch(**{**vars(batch), "video": video[side]})
        for _ in range(3):
            one.step(one.module, batch)
            losses[side].append(one.loss())
    assert losses["ours"] == pytest.approx(losses["plain"], abs=1e-5)
    assert len(set(losses["ours"])) == 3 and not torch.equal(before, model.get_parameter("classifier.weight"))
    plain = sides["plain"].module.get_submodule("model").state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain[key], rtol=0, atol=2e-5, msg=key)  # two of three steps' size, where a gradient is rounding noise


def test_the_plain_side_gets_floats_and_transformers_own_class() -> None:
    model = random_model("timesformer-tiny", "native", QUICK_STORED)
    plain: Any = Plain(model, Precision("fp32", CPU)).module
    seen: list[Tensor] = []
    plain.model.register_forward_pre_hook(lambda module, args, given: seen.append(given["pixel_values"]), with_kwargs=True)
    plain(torch.full((1, 8, 3, 64, 64), 255, dtype=torch.uint8))
    assert type(plain.model).__module__.startswith("transformers.") and type(plain.model).__name__ == "TimesformerForVideoClassification"
    assert seen[0].dtype == torch.float32
    assert seen[0][0, 0, :, 0, 0].tolist() == pytest.approx([(1 - mean) / std for mean, std in zip(model.pixels.mean, model.pixels.std, strict=True)])


class Fake:
    """A side that counts its steps and does nothing."""

    def __init__(self) -> None:
        self.module: nn.Module = nn.Linear(2, 2)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        self.num_steps, self.mean = 0, 0.5

    def largest(self, batch_size: int, group: object) -> int:
        return batch_size

    def batch(self, size: int) -> Batch:
        return cached_batch((size, 1, 2, 2, 3), CPU)

    def step(self, forward: nn.Module, batch: Batch) -> None:
        self.num_steps += 1

    def loss(self) -> float | None:
        return self.mean if math.isfinite(self.mean) else None


@pytest.mark.parametrize(("limit_s", "steps"), [(9.0, 5), (20.0, 10), (1000.0, 30), (0.0, 5)])
def test_a_measurement_takes_the_steps_that_fit_into_its_time(limit_s: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_seconds(step: Any, device: torch.device) -> float:
        step()
        return 2.0

    monkeypatch.setattr(step_clock, "waited_s", two_seconds)
    side = Fake()
    way = Way("eager", side, 4, None)
    way.measure(CPU, 10, 30, limit_s)
    assert way.steps == steps and way.step_ms == [2000.0] and way.clips_per_s == [2.0] and way.first_s == 2.0
    warm = side.num_steps - steps
    assert warm == 10 if limit_s else warm == 3  # the first and two more
    way.measure(CPU, 10, 30, limit_s)
    assert side.num_steps == warm + 2 * steps and len(way.step_ms) == 2


def test_few_steps_are_never_made_more() -> None:
    side = Fake()
    way = Way("eager", side, 1, None)
    way.measure(CPU, 1, 2, 60.0)
    assert (way.steps, side.num_steps) == (2, 3)


def test_a_loss_that_is_not_finite_is_no_measurement() -> None:
    side = Fake()
    side.mean = math.nan
    way = Way("eager", side, 1, None)
    with pytest.raises(RuntimeError, match="not finite"):
        way.measure(CPU, 1, 1, 60.0)
    assert not way.step_ms


@pytest.mark.parametrize("made", [Ours, Plain])
def test_both_sides_see_a_loss_that_is_not_finite(made: type[Ours] | type[Plain]) -> None:
    model = random_model("videomae-tiny", "native", QUICK_STORED)
    model.get_parameter("classifier.bias").data.fill_(math.inf)
    side = made(model, Precision("fp32", CPU))
    batch = side.batch(1)
    side.step(side.module, batch)
    assert side.loss() is None


def test_every_size_is_compiled_for_itself() -> None:
    """By default torch compiles the second size that it sees for sizes of all kinds, which is slower."""
    side = Ours(random_model("videomae-tiny", "native", QUICK_STORED), Precision("fp32", CPU))
    ways = [Way("compiled", side, size, "eager") for size in (4, 3, 2)]
    for way in ways:
        way.measure(CPU, 1, 1, 60.0)
    assert [(way.graphs, way.breaks) for way in ways] == [(1, 0)] * 3  # otherwise the third has none of its own
    torch.compiler.reset()


def test_the_common_micro_batch_is_the_least_and_the_larger_are_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes({"ours": 16, "plain": 8}) == (8, {"ours": 16})
    assert sizes({"ours": 64, "plain": 64}) == (64, {})
    monkeypatch.setattr(Plain, "largest", lambda self, batch_size, group: batch_size // 2)
    path = tmp_path / "step.jsonl"
    results = bench_step(StepConfig(**SMALL, model_name=TINY[:1], geometry=("native",), variant=("eager", "plain"), output=path))
    found = {one.name.removeprefix("step/videomae-tiny/native/"): one for one in results}
    at = {name: one.config["micro_batch"] for name, one in found.items() if name.endswith("/speed")}
    assert at == {"eager/speed": 1, "plain/speed": 1, "eager_at_its_best/speed": 2}
    assert "eager/over_plain" in found and "eager_at_its_best/over_plain" not in found
    pairs = zip(*(written(path, f"step/videomae-tiny/native/{way}/speed") for way in ("eager", "plain")), strict=True)
    ratios = [ours / plain for ours, plain in pairs]
    assert found["eager/over_plain"].spread == pytest.approx((min(ratios), max(ratios)))


def written(path: Path, name: str) -> list[float]:
    """The speed of each round, from the lines as they were written: the median of one, of two."""
    medians = [line["value"] for line in map(json.loads, path.read_text().splitlines()) if line["name"] == name]
    assert len(medians) == 2
    return [medians[0], 2 * medians[1] - medians[0]]


def test_out_of_memory_is_a_line_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def too_much(self: Plain, forward: nn.Module, batch: Batch) -> None:
        raise torch.cuda.OutOfMemoryError("planted")

    monkeypatch.setattr(Plain, "step", too_much)
    path = tmp_path / "step.jsonl"
    bench_step(StepConfig(**SMALL, model_name=TINY[:1], geometry=("native",), variant=("plain", "eager"), output=path))
    said = capsys.readouterr().out
    assert said.count("videomae-tiny/native, plain: 2 clips at once do not fit into this GPU's memory; left out") == 1
    assert speeds(path) == ["step/videomae-tiny/native/eager/speed"] * 2


def test_another_failure_is_a_line_too_but_makes_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(self: Plain, forward: nn.Module, batch: Batch) -> None:
        raise RuntimeError("planted\nand more")

    monkeypatch.setattr(Plain, "step", broken)
    with pytest.raises(InputError, match="1 failures"):
        bench_step(StepConfig(**SMALL, model_name=TINY[:1], geometry=("native",), variant=("plain", "eager")))
    said = capsys.readouterr().out
    assert "plain: failed, RuntimeError: planted\n" in said and "videomae-tiny/native 16x64x64  eager" in said


def test_a_side_that_finds_no_micro_batch_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nothing_fits(self: Plain, batch_size: int, group: object) -> int:
        raise InputError("planted")

    monkeypatch.setattr(Plain, "largest", nothing_fits)
    results = bench_step(StepConfig(**SMALL, model_name=TINY[:1], geometry=("native",), variant=("plain", "eager")))
    assert {one.name.split("/")[3] for one in results if one.name != "step/matmul"} == {"eager"}
    assert "not even one clip fits into this GPU for plain" in capsys.readouterr().out


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def killed(self: Plain, forward: nn.Module, batch: Batch) -> None:
        taken.append(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(Plain, "step", killed)
    path = tmp_path / "step.jsonl"
    with pytest.raises(KeyboardInterrupt):
        bench_step(StepConfig(**SMALL, model_name=TINY[:1], geometry=("native",), variant=("eager", "plain"), output=path))
    assert len(taken) == 1
    assert set(read_results(path)) == {"step/matmul", "step/videomae-tiny/native/eager/speed"}


def test_what_comes_after_the_minutes_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = bench_step(StepConfig(**SMALL, geometry=("native",), minutes=1e-9))
    assert [one.name for one in results] == ["step/matmul"]
    said = capsys.readouterr().out
    assert all(f"{name}/native: left out, --minutes 1e-09 are over" in said for name in TINY)


def test_compiling_is_not_begun_when_it_cannot_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: value for name, value in SMALL.items() if name != "quick"} | {"model_name": TINY[:1], "geometry": ("native",), "minutes": 1.5}
    results = bench_step(StepConfig(**few, variant=("compiled", "eager")))
    assert "compiled: round 1 left out" in capsys.readouterr().out
    assert {one.name.split("/")[3] for one in results if one.name != "step/matmul"} == {"eager"}


def test_a_matrix_product_is_counted_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_clock, "step_times_ms", lambda step, device, steps: [2.0] * steps)
    assert matmul_tflops(CPU, torch.float32, 3) == pytest.approx([2 * 1024**3 / 2e-3 / 1e12] * 3)


def row(part: str, way: str, mfu: list[float], over_plain: list[float]) -> Row:
    return Row(part, "16x224x224", way, 64, [1.0], [1.0], [1.0], mfu, 1.0, 1.0, 1.0, over_plain, {})


def test_the_verdict_says_how_the_aims_stand_on_a_gpu_alone() -> None:
    native, full = "videomae-base/native", "videomae-base/full"
    rows = [
        row(native, "eager", [0.43, 0.41, 0.42], [1.4]),
        row(native, "compiled", [0.46], [1.5]),
        row(native, "plain", [0.9], []),
        row(full, "eager", [0.6], [1.2]),
    ]
    said = verdict(rows, "NVIDIA H200")
    assert "videomae-base/native compiled comes to 46.0 % MFU on NVIDIA H200 (aim 45 %: reached)" in said
    assert "videomae-base/native eager 1.40 (reached)" in said and "videomae-base/full eager 1.20 (missed)" in said
    assert "42.0 % MFU on NVIDIA H200 (aim 45 %: missed)" in verdict(rows[:1], "NVIDIA H200")
    assert "which is no H200" in verdict(rows, "NVIDIA A100-SXM4-80GB")
    assert "videomae-base/native has no MFU on NVIDIA H200" in verdict([], "NVIDIA H200") and "not measured" in verdict([], "NVIDIA H200")
    assert "say nothing" in verdict(rows, None) and "reached" not in verdict(rows, None)


@pytest.mark.parametrize("flag", ["batch_size", "micro_batch", "warm_up", "steps", "rounds", "minutes"])
def test_flags_below_one_are_refused(flag: str) -> None:
    values: Any = {flag: 0}
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} 0"):
        StepConfig(**values)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: torch sees no GPU"):
        bench_step(StepConfig(quick=True, device="cuda"))


@pytest.mark.gpu
def test_a_quick_run_on_a_gpu_reads_its_events_and_its_memory(tmp_path: Path) -> None:
    found = {one.name: one for one in bench_step(StepConfig(quick=True, device="cuda", output=tmp_path / "step.jsonl"))}
    assert found["step/videomae-tiny/native/eager/memory"].value > 0
    assert found["step/videomae-tiny/native/compiled/speed"].config["graphs"] == 1
    device = torch.device("cuda", 0)
    assert len(step_times_ms(lambda: None, device, 3)) == 3
