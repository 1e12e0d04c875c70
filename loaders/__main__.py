"""python -m loaders order|stage|certify: what a training will read, a copy nearer to it, and whether it read what was planned."""

from __future__ import annotations

import sys

from clips import command

from .certify import CertifyConfig, certify
from .order import OrderConfig, order
from .stage import StageConfig, stage


def main() -> int:
    """The exit code of the verb."""
    command.show_log()
    verbs = {"order": OrderConfig, "stage": StageConfig, "certify": CertifyConfig}
    config = command.parse_verb(verbs, "python -m loaders", "what a training reads")
    if isinstance(config, StageConfig):
        stage(config)
    elif isinstance(config, CertifyConfig):
        return certify(config)
    elif isinstance(config, OrderConfig):
        return order(config)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
