"""python -m training compare|agree|doctor: which of several runs is best, whether two predictions agree, whether a node will do."""

from __future__ import annotations

import sys

from clips import command


def main() -> int:
    """The exit code of the verb."""
    command.show_log()
    from .doctor import DoctorConfig, doctor

    if sys.argv[1:2] == ["doctor"] and not {"-h", "--help"} & set(sys.argv):
        return doctor(sys.argv[2:])
    from .agree import AgreeConfig, agree  # torch, which the doctor does without, takes seconds
    from .compare import CompareConfig, compare

    verbs = {"compare": CompareConfig, "agree": AgreeConfig, "doctor": DoctorConfig}
    config = command.parse_verb(verbs, "python -m training", "which of several runs is best, whether two predictions agree, whether a node will do")
    if isinstance(config, CompareConfig):
        return compare(config)
    if isinstance(config, AgreeConfig):
        return agree(config)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
