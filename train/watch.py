"""A run, watched as it goes: its newest lines judged, and what is new told once."""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.diagnosis import Verdict, case_of, judge
from train.history import History, read_history
from train.run import read_run
from train.traps import traps

_KEPT = 200  # lines of steps: as many as a look needs
_LOOKS = 80  # in a run, beside those at evaluations


class Watch:
    """`start` and `after` give the lines to tell. It keeps a few lines of metrics, and costs a
    fraction of a millisecond where it looks at them."""

    def __init__(self, directory: Path, n_params: int) -> None:
        """Of the run that its directory describes; what it has logged already counts."""
        run = read_run(directory)
        self._case = case_of(run)
        self._n_params = n_params
        self._train_tokens = run["data"]["splits"]["train"]["tokens"]
        self._first: list[Mapping[str, Any]] = []
        self._steps: deque[Mapping[str, Any]] = deque(maxlen=_KEPT)
        self._evaluations: list[Mapping[str, Any]] = []  # the best one and the last
        self._told: set[str] = set()
        self._standing, self._looked_at = "", 0
        try:
            history = read_history(directory)
        except ValueError:  # it has logged nothing yet
            return
        for record in history.steps:
            self._keep(record)
        for record in history.evaluations:
            self._keep_evaluation(record)

    def start(self) -> list[str]:
        """What the settings and the data alone say, and what the run will be compared with."""
        case, reference = self._case, self._case.reference
        known = traps(case.config, case.recipe or case.config, self._n_params, self._train_tokens)
        found = [*known, *case.data]
        self._told |= {finding.name for finding in found}
        lines = [finding.line for finding in [*found, *case.notes]]
        if reference is not None:
            lines.append(
                f"compared with the reference curve of {reference.preset}: {reference.n_seed} "
                f"seeds, {reference.made_by['precision']} on {reference.made_by['devices']}"
            )
        return lines

    def after(self, record: Mapping[str, Any]) -> list[str]:
        """What to tell after a new line of metrics: at each evaluation how the run stands, between
        them only that something is wrong, or no longer is."""
        evaluated = "val_loss" in record
        if evaluated:
            self._keep_evaluation(record)
        else:
            self._keep(record)
            every = self._case.config.max_iters / _LOOKS
            if record["iter"] < self._looked_at + every and record.get("train_loss") is not None:
                return []
        self._looked_at = record["iter"]
        verdict = self.verdict()
        new = [finding for finding in verdict.findings if finding.name not in self._told]
        changed = verdict.standing != self._standing
        alarming = "off track" in (verdict.standing, self._standing)
        self._standing = verdict.standing
        self._told |= {finding.name for finding in new}
        if evaluated or (changed and alarming):
            return verdict.lines()
        return [finding.line for finding in new]

    def verdict(self) -> Verdict:
        first = self._first if len(self._steps) == _KEPT else []
        return judge(self._case, [*first, *self._steps], self._evaluations)

    def _keep(self, record: Mapping[str, Any]) -> None:
        if not self._first:
            self._first.append(record)
        self._steps.append(record)

    def _keep_evaluation(self, record: Mapping[str, Any]) -> None:
        def loss(evaluation: Mapping[str, Any]) -> float:
            value = evaluation.get("val_loss")
            return math.inf if value is None else value

        best = min([*self._evaluations, record], key=loss)
        self._evaluations = [record] if best is record else [best, record]


def verdict_of(history: History) -> Verdict:
    """How a run stands, from its directory alone."""
    return judge(case_of(history.run), history.steps, history.evaluations)
