"""python -m training compare|agree: which of several runs is best, and whether two predictions agree."""

from __future__ import annotations

import sys

from clips import command

from .agree import AgreeConfig, agree
from .compare import CompareConfig, compare


def main() -> int:
    """The exit code of the verb."""
    command.show_log()
    verbs = {"compare": CompareConfig, "agree": AgreeConfig}
    config = command.parse_verb(verbs, "python -m training", "which of several runs is best, and whether two predictions agree")
    if isinstance(config, CompareConfig):
        return compare(config)
    if isinstance(config, AgreeConfig):
        return agree(config)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
