"""What an epoch is worth: metrics on val, which choose the best epoch; its weights and threshold are kept, and judged on test.

batches in as many rounds on every rank -> probabilities, each clip once -> metrics -> best/ and threshold.json, or the report
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from clips.errors import InputError
from clips.format import ClipFacts

from .distributed import Group
from .evaluation import EvaluationConfig, HasVideo, Scores, in_words, judged_of, metrics_of, prediction_rows, probabilities
from .metrics import METRICS
from .precision import Precision
from .progress import Progress
from .report import report
from .run_folder import RunFolder
from .threshold import best_threshold, write_threshold

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """One run's. `poll` is asked before each round, equally often on every rank; `save` writes the best weights with a note."""

    config: EvaluationConfig
    folder: RunFolder
    group: Group
    progress: Progress
    precision: Precision
    class_names: Sequence[str]
    max_bad_clips: int
    poll: Callable[[], object]

    def measure(
        self, model: nn.Module, facts: Sequence[ClipFacts], batches: Iterator[HasVideo], rounds: int, num_views: int = 1
    ) -> tuple[dict[str, Any], Scores]:  # Any: as `metrics_of`
        """The split's metrics and scores; clips that could not be read are named and left out. A rank may have fewer batches than `rounds`."""
        asked = self._in_rounds(batches, rounds * num_views)
        scores = probabilities(model, asked, len(facts), self.precision, self.group, self.max_bad_clips, num_views)
        for reason in scores.unread.values():
            logger.warning(f"left out of the evaluation: {reason}")
        return metrics_of(facts, scores, self.class_names, self.config.positive), scores

    def _in_rounds(self, batches: Iterator[HasVideo], rounds: int) -> Iterator[HasVideo]:
        for _ in range(rounds):
            self.poll()
            batch = next(batches, None)
            if batch is not None:
                yield batch

    def score(self, metrics: dict[str, Any]) -> bool:  # Any: as above
        """Enters an epoch's metrics on val into the log and the progress; whether it is the best so far. Without val the last epoch is."""
        progress, epoch, name = self.progress, self.progress.trained, self.config.best_metric
        if metrics:
            self.folder.log({"step": progress.step, "epoch": epoch} | {f"val/{name}": metrics[name] for name in (*METRICS, "confusion", "unread")})
            logger.info("val: " + in_words(metrics))
            if metrics["loss"] is None:
                raise InputError(f"val: {'; '.join(metrics['notes'])} Take a lower --lr; best/ holds the best epoch before, if there was one.")
        else:
            logger.info("no split val: the last epoch counts as the best")
        value = metrics.get(name)
        if metrics and value is None:
            logger.info(f"val: {name} is undefined ({'; '.join(metrics['notes'])}); the last epoch counts as the best until one has it")
        return progress.score(None if value is None else -value if name == "loss" else value, epoch)

    def keep_threshold(self, facts: Sequence[ClipFacts], scores: Scores) -> None:
        """threshold.json of the best epoch."""
        judged = judged_of(facts, scores, self.class_names, self.config.positive)
        write_threshold(self.folder.path, best_threshold(judged, self.progress.trained))

    def report(self, split: str, facts: Sequence[ClipFacts], metrics: dict[str, Any], scores: Scores) -> None:  # Any: as above
        """All that is said of a split at the end."""
        judged = judged_of(facts, scores, self.class_names, self.config.positive)
        report(self.folder, split, self.progress.step, self.progress.trained, judged, metrics, prediction_rows(facts, split, scores))
