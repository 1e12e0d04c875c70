"""What `python -m benchmarks decode` found, out of its results alone: a table, which decoder to take on that node, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips.errors import InputError

from .result import Result, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ["clips", "decoder", "threads", "share", "frames/s", "clips/s", "CPU ms/clip", "host CPU, % of a core", "GPU, GiB"]
LEGEND = """simplejpeg and zstd give stored frames in the host's memory, …-resized finished clips there (a training on a CPU), …-gpu finished clips on the GPU;
dali-cpu and dali-mixed are --loader dali: finished clips on the CPU and on the GPU; nvimgcodec is JPEG to frames on the GPU and nothing more. clips are
frames x pixels stored and JPEG's quality (raw: zstd); share is what the JPEG engine is given. GPU: what opening a way took beside those open before it."""
DALI, OURS = "dali", "webdataset"
LOADERS = {"simplejpeg-resized": OURS, "simplejpeg-gpu": OURS, "dali-cpu": DALI, "dali-mixed": DALI}
ON_CPU, ON_GPU = ("simplejpeg-resized", "dali-cpu"), ("simplejpeg-gpu", "dali-mixed")
WIDTH_INCH, HEIGHT_INCH, DPI = 6.5, 5.5, 120


@dataclass(frozen=True)
class Row:
    """One decoder with its threads and share on one kind of clips, and what was measured of it: speed, cpu, host, gpu_memory."""

    clips: str
    config: dict[str, Any]  # Any: JSON
    found: dict[str, Result] = field(default_factory=dict)

    def kind(self, quality: int) -> str:
        """With that quality where there is none: zstd's clips beside the same ones as JPEG."""
        return self.clips.replace("raw", f"q{quality}")

    @property
    def decoder(self) -> str:
        return str(self.config["decoder"])

    @property
    def threads(self) -> int:
        return int(self.config["threads"])

    @property
    def share(self) -> float | None:
        return None if self.config["share"] is None else float(self.config["share"])

    def told(self, kind: str, digits: int, times: float = 1) -> str:
        """`median [least-greatest]`, or a dash."""
        if kind not in self.found:
            return "-"
        one = self.found[kind]
        return f"{times * one.value:.{digits}f} [{times * one.spread[0]:.{digits}f}-{times * one.spread[1]:.{digits}f}]"


def report(results: Mapping[str, Result], missing: Mapping[str, str], plot: Path | None) -> None:
    """Prints the table and the choice, and draws the plot where one is asked for; raises InputError where nothing was measured."""
    rows = rows_of(results)
    if not rows:
        raise InputError("no decoder was measured: the reasons stand above. Name those at hand with --decoders, or give more --minutes.")
    cells = [
        [
            *(row.clips, row.decoder, str(row.threads), "-" if row.share is None else f"{row.share:g}"),
            *(row.told("speed", 0, row.config["frames"]), row.told("speed", 0), row.told("cpu", 2), row.told("host", 0)),
            f"{row.found['gpu_memory'].value:.2f}" if "gpu_memory" in row.found else "-",
        ]
        for row in rows
    ]
    print(table(HEADER, cells))
    print(LEGEND)
    print(choice(rows, missing))
    if plot:
        draw(plot, rows)


def rows_of(results: Mapping[str, Result]) -> list[Row]:
    """Those of this benchmark whose speed is known."""
    rows: dict[str, Row] = {}
    for name, one in results.items():
        prefix, _, kind = name.rpartition("/")
        if name.startswith("decode/"):
            rows.setdefault(prefix, Row(" ".join(prefix.split("/")[1:3]), one.config)).found[kind] = one
    return [row for row in rows.values() if "speed" in row.found]


def choice(rows: Sequence[Row], missing: Mapping[str, str]) -> str:
    """Which decoder to take on the node that was measured, of the first kind of clips in the table, in a sentence or two: by what was measured alone."""
    at_base = [row for row in rows if row.clips == rows[0].clips]
    gpu = next((row.config["gpu"] for row in rows if row.config["gpu"]), None)
    said = _on_gpu(at_base, gpu) if gpu else _on_cpu(at_base, missing)
    return f"{said} ({rows[0].clips}, {rows[0].config['source']}, {rows[0].config['cores']} cores.)"


def _on_cpu(rows: Sequence[Row], missing: Mapping[str, str]) -> str:
    found = {row.decoder: row for row in sorted(rows, key=lambda row: row.threads) if row.decoder in ON_CPU}  # of each decoder that of the most threads
    reasons = {reason for decoder, reason in missing.items() if decoder not in ON_CPU}
    without = "GPU decoders were not measured" + (f": {'; '.join(sorted(reasons))}." if reasons else ".")
    if len(found) < len(ON_CPU):
        return f"Nothing to choose from for a node without a GPU: {' and '.join(ON_CPU)} were not both measured. {without}"
    ours, dali = (found[decoder] for decoder in ON_CPU)
    best = dali if _is_less(dali.found["cpu"], ours.found["cpu"]) else ours
    told = " against ".join(f"{row.told('cpu', 1)} ({row.decoder})" for row in (best, dali if best is ours else ours))
    return f"On a node like this, without a GPU, take --loader {LOADERS[best.decoder]}: {told} CPU ms a finished clip. {without}"


def _on_gpu(rows: Sequence[Row], gpu: str) -> str:
    """For each number of threads that both were measured with."""
    clauses = []
    for threads in sorted({row.threads for row in rows}):
        of = {decoder: [row for row in rows if row.decoder == decoder and row.threads == threads] for decoder in ON_GPU}
        if not all(of.values()):
            continue
        ours, dali = (max(found, key=lambda row: row.found["speed"].value) for found in of.values())
        best = dali if _is_less(ours.found["speed"], dali.found["speed"]) else ours  # alike: the simpler one
        share = f" --hw-decoder-load {dali.share:g}" if best is dali and dali.share is not None else ""
        other = ours if best is dali else dali
        noun = "thread" if threads == 1 else "threads"
        clauses.append(f"with {threads} {noun} --loader {LOADERS[best.decoder]}{share}, {best.told('speed', 0)} clips/s against {other.told('speed', 0)}")
    if not clauses:
        return f"Nothing to choose from for {gpu}: {' and '.join(ON_GPU)} were not both measured with the same number of threads."
    return f"On a node with {gpu} take {'; '.join(clauses)}."


def _is_less(one: Result, other: Result) -> bool:
    """Clearly: their spreads do not meet."""
    return one.spread[1] < other.spread[0]


def draw(path: Path, rows: Sequence[Row]) -> None:
    """CPU time by kind of clips, speed by threads and, where it was varied, speed by the engine's share."""
    from matplotlib.figure import Figure  # comes with the extra `train` alone

    quality = next((row.config["quality"] for row in rows if row.config["quality"]), 0)
    base = rows[0].kind(quality)
    at_base = [row for row in rows if row.kind(quality) == base]
    threads, shares = rows[0].threads, {row.share for row in at_base if row.share is not None}
    base_share = next((row.share for row in at_base if row.share is not None), None)
    panels = 2 + (len(shares) > 1)
    figure = Figure(figsize=(WIDTH_INCH * panels, HEIGHT_INCH), layout="constrained")
    axes = figure.subplots(1, panels)
    _bars(axes[0], [row for row in rows if row.threads == threads and row.share in (None, base_share)], threads, quality)
    _lines(axes[1], [row for row in at_base if row.share in (None, base_share)], "threads", f"{base}: by threads")
    if panels > 2:
        _lines(axes[2], [row for row in at_base if row.share is not None and row.threads == threads], "share", f"{base}: by the JPEG engine's share")
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _bars(axes: Axes, rows: Sequence[Row], threads: int, quality: int) -> None:
    decoders, kinds = list(dict.fromkeys(row.decoder for row in rows)), list(dict.fromkeys(row.kind(quality) for row in rows))
    height = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        of = [row for row in rows if row.kind(quality) == kind]
        places = [decoders.index(row.decoder) + (number - (len(kinds) - 1) / 2) * height for row in of]
        cpu = [row.found["cpu"] for row in of]
        whiskers = [[one.value - one.spread[0] for one in cpu], [one.spread[1] - one.value for one in cpu]]
        axes.barh(places, [one.value for one in cpu], height, xerr=whiskers, label=kind, error_kw={"ecolor": "0.3", "linewidth": 0.8})
    axes.set_yticks(range(len(decoders)), decoders)
    axes.invert_yaxis()
    axes.set(title=f"CPU time, {threads} threads", xlabel="CPU ms a clip")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, title="frames x px, quality (JPEG)", title_fontsize=8)


def _lines(axes: Axes, rows: Sequence[Row], what: str, title: str) -> None:
    """Clips a second over `threads` or `share`, one line a decoder."""
    for decoder in dict.fromkeys(row.decoder for row in rows):
        points = sorted((getattr(row, what), row.found["speed"]) for row in rows if row.decoder == decoder)
        values = [one.value for _, one in points]
        whiskers = [[one.value - one.spread[0] for _, one in points], [one.spread[1] - one.value for _, one in points]]
        axes.errorbar([x for x, _ in points], values, yerr=whiskers, fmt="o-", capsize=3, label=decoder)
    axes.set_xticks(sorted({getattr(row, what) for row in rows}))
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel=what, ylabel="clips/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
