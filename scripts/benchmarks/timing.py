"""Timing in turn: ratios of two contenders whose rounds alternate.

A machine's speed drifts by tens of percent within minutes, for both alike. So each peer is timed
against ours round by round, with nobody else's memory or caches in the way, and the ratio is that
of the medians.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from scripts.benchmarks.job import Contender, Job
from scripts.benchmarks.worker import Round, Worker, WorkerError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What one contender did. Of peers: also ours beside it, round by round."""

    contender: Contender
    rounds: list[Round]
    facts: dict[str, Any]
    beside: list[Round]
    error: str | None = None

    @property
    def rate(self) -> float:
        """Tokens (or bytes) a second, the median of the rounds."""
        return median(r.rate for r in self.rounds)

    @property
    def seconds(self) -> float:
        """Of one repetition of the work, the median."""
        return median(r.seconds / r.repeats for r in self.rounds)

    @property
    def memory(self) -> int | None:
        """The most bytes that its process had."""
        found = [r.memory for r in self.rounds if r.memory is not None]
        return max(found) if found else None

    @property
    def ratio(self) -> float | None:
        """How many times as fast ours was, beside it."""
        return median(r.rate for r in self.beside) / self.rate if self.beside else None

    @property
    def ratios(self) -> list[float]:
        """The same of each pair of rounds."""
        return [ours.rate / theirs.rate for ours, theirs in zip(self.beside, self.rounds)]  # noqa: B905


def ceilings(contender: Contender, say: Say) -> dict[str, float]:
    """What this machine can do: FLOP/s of matrix products, bytes/s read."""
    say("the machine's ceilings")
    with Worker(contender, Job("ceilings")) as worker:
        return worker.facts


def compare(
    ours: Contender, peers: list[Contender], job: Job, n_round: int, say: Say
) -> list[Result]:
    """Ours first, then each peer. A peer that fails is a result with an error.

    WorkerError if ours fails.
    """
    say(f"{ours.name}: warming up")
    with Worker(ours, job) as worker:
        rounds: list[Round] = []
        results = []
        for peer in peers:
            say(f"{peer.name}: warming up")
            try:
                with Worker(peer, job) as other:
                    beside, theirs = [], []
                    for i in range(n_round):
                        say(f"{peer.name}: round {i + 1} of {n_round}, in turn with {ours.name}")
                        beside.append(worker.round())
                        theirs.append(other.round())
                    results.append(Result(peer, theirs, other.facts, beside))
                    rounds += beside
            except WorkerError as error:
                if str(error).startswith(ours.name):
                    raise
                say(str(error))
                results.append(Result(peer, [], {}, [], str(error)))
        if not rounds:
            for i in range(n_round):
                say(f"{ours.name}: round {i + 1} of {n_round}")
                rounds.append(worker.round())
        return [Result(ours, rounds, worker.facts, []), *results]
