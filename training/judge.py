"""What an epoch is worth: metrics on val, which choose the best epoch and its threshold; its weights are judged on test.

batches in as many rounds on every rank -> probabilities, each clip once -> metrics -> the progress, or the report
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
from .evaluation import EvaluationConfig, HasVideo, Scores, in_words, judged_of, metrics_of, prediction_rows, probabilities, why_unusable
from .metrics import METRICS
from .precision import Precision
from .progress import Progress
from .report import report
from .run_folder import RunFolder
from .threshold import best_threshold

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """One run's. `poll` is asked before each round, equally often on every rank."""

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

    def score(self, facts: Sequence[ClipFacts], metrics: dict[str, Any], scores: Scores | None) -> None:  # Any: as above
        """Enters an epoch's metrics on val into the log and the progress, which keeps the best so far. Without val, without scores, the last epoch is."""
        progress, epoch, name = self.progress, self.progress.trained, self.config.best_metric
        if scores is None:
            logger.info("no split val: the last epoch counts as the best")
            progress.score(None, epoch)
            return
        self.folder.log({"step": progress.step, "epoch": epoch} | {f"val/{name}": metrics[name] for name in (*METRICS, "confusion", "unread")})
        logger.info("val: " + in_words(metrics))
        if (reason := why_unusable(metrics, scores)) is not None:
            raise InputError(f"val: {reason}")
        value = metrics[name]
        if value is None:
            logger.info(f"val: {name} is undefined ({' '.join(metrics['notes'])}); the last epoch counts as the best until one has it")
        judged = judged_of(facts, scores, self.class_names, self.config.positive)
        progress.score(None if value is None else -value if name == "loss" else value, epoch, metrics, best_threshold(judged, epoch))

    def report(self, split: str, facts: Sequence[ClipFacts], metrics: dict[str, Any], scores: Scores) -> None:  # Any: as above
        """All that is said of a split at the end."""
        judged = judged_of(facts, scores, self.class_names, self.config.positive)
        report(self.folder, split, self.progress.step, self.progress.trained, judged, metrics, prediction_rows(facts, split, scores))
