"""python -m benchmarks loader|busy|ahead|shortcuts|convert|storage|plot|demo: what the parts cost on this machine."""

from __future__ import annotations

import sys

from clips import command

from .ahead import AheadConfig, bench_ahead
from .busy import BusyConfig, bench_busy
from .convert import ConvertBenchConfig, bench_convert
from .demo import DemoConfig, demo
from .loader import LoaderBenchConfig, bench
from .plot import PlotConfig, plot
from .shortcuts import ShortcutsConfig, bench_shortcuts
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
    elif isinstance(config, PlotConfig):
        plot(config)
    elif isinstance(config, DemoConfig):
        demo(config)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
