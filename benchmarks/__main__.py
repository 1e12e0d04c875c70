"""python -m benchmarks loader|convert|storage|demo: what the parts cost on this machine."""

from __future__ import annotations

import sys

from clips import command

from .convert import ConvertBenchConfig, bench_convert
from .demo import DemoConfig, demo
from .loader import LoaderBenchConfig, bench
from .storage import StorageBenchConfig, bench_storage


def main() -> int:
    """The exit code of the verb."""
    command.show_log()
    verbs = {"loader": LoaderBenchConfig, "convert": ConvertBenchConfig, "storage": StorageBenchConfig, "demo": DemoConfig}
    config = command.parse_verb(verbs, "python -m benchmarks", "what the parts cost on this machine")
    if isinstance(config, DemoConfig):
        demo(config)
    elif isinstance(config, LoaderBenchConfig):
        bench(config)
    elif isinstance(config, ConvertBenchConfig):
        bench_convert(config)
    elif isinstance(config, StorageBenchConfig):
        bench_storage(config)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
