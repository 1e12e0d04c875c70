"""python -m benchmarks loader|demo: what the parts cost on this machine."""

from __future__ import annotations

import sys

from clips import command

from .demo import DemoConfig, demo
from .loader import LoaderBenchConfig, bench


def main() -> int:
    """The exit code of the verb."""
    command.show_log()
    config = command.parse_verb({"loader": LoaderBenchConfig, "demo": DemoConfig}, "python -m benchmarks", "what the parts cost on this machine")
    if isinstance(config, DemoConfig):
        demo(config)
    elif isinstance(config, LoaderBenchConfig):
        bench(config)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
