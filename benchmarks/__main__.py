"""python -m benchmarks loader|busy|ahead|shortcuts|convert|storage|step|decode|fed|plot|demo: what the parts cost on this machine."""

from __future__ import annotations

import sys

from clips import command

from .ahead import AheadConfig, bench_ahead
from .busy import BusyConfig, bench_busy
from .convert import ConvertBenchConfig, bench_convert
from .decode import DecodeConfig, bench_decode
from .demo import DemoConfig, demo
from .fed import FedConfig, bench_fed
from .loader import LoaderBenchConfig, bench
from .plot import PlotConfig, plot
from .shortcuts import ShortcutsConfig, bench_shortcuts
from .step import StepConfig, bench_step
from .storage import StorageBenchConfig, bench_storage


def main() -> int:
    """The exit code of the verb."""
    command.show_log()
    verbs = {
        "loader": LoaderBenchConfig,
        "busy": BusyConfig,
        "ahead": AheadConfig,
        "shortcuts": ShortcutsConfig,
        "convert": ConvertBenchConfig,
        "storage": StorageBenchConfig,
        "step": StepConfig,
        "decode": DecodeConfig,
        "fed": FedConfig,
        "plot": PlotConfig,
        "demo": DemoConfig,
    }
    config = command.parse_verb(verbs, "python -m benchmarks", "what the parts cost on this machine")
    if isinstance(config, LoaderBenchConfig):
        bench(config)
    elif isinstance(config, BusyConfig):
        bench_busy(config)
    elif isinstance(config, AheadConfig):
        bench_ahead(config)
    elif isinstance(config, ShortcutsConfig):
        bench_shortcuts(config)
    elif isinstance(config, ConvertBenchConfig):
        bench_convert(config)
    elif isinstance(config, StorageBenchConfig):
        bench_storage(config)
    elif isinstance(config, StepConfig):
        bench_step(config)
    elif isinstance(config, DecodeConfig):
        bench_decode(config)
    elif isinstance(config, FedConfig):
        bench_fed(config)
    elif isinstance(config, PlotConfig):
        plot(config)
    elif isinstance(config, DemoConfig):
        demo(config)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
