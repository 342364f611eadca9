"""The evolutionary search of LongRoPE2 (arXiv 2502.20082, Alg. 1) for any objective; it can be killed at any moment and goes on exactly.

Candidates follow from (seed, id) and the scores before them, so a search that is started again makes the same ones and takes the scores
that its log has. Numbers alone decide: the result holds no times.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import UserError
from components.search.log import Log, replace_file
from components.search.space import Key, Space, Vector
from components.search.variation import Candidate, Evolution, first_generation, next_generation

Objective = Callable[[Vector, int], float]  # (factors (rotary_dim/2,), r) -> score, lower is better
Progress = Callable[[dict[str, Any]], None]

# What a bad candidate can cause: overflow, a singular matrix, no memory (torch's is a RuntimeError). Others are defects or a wish to stop.
FAILURES = (ArithmeticError, RuntimeError, ValueError, MemoryError)


@dataclass(frozen=True)
class Scored:
    """A candidate with its score (inf: it failed, for `reason`) and how long that took."""

    candidate: Candidate
    score: float
    seconds: float
    reason: str | None = None


@dataclass(frozen=True)
class Result:
    """What a search found. It is equal, to the byte when saved, for equal settings and an objective that is a function.

    r, factors (rotary_dim/2), score, id: of the best candidate. failed: how many of the `evaluations` had no finite score. ended: "budget",
    or "exhausted" when no child could be made that was not there before. history: best, median and r of every generation.
    """

    r: int
    factors: tuple[float, ...]
    score: float
    id: int
    evaluations: int
    failed: int
    ended: str
    history: tuple[dict[str, Any], ...]
    settings: dict[str, Any] = field(repr=False)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        replace_file(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")


def search(
    objective: Objective,
    space: Space,
    evolution: Evolution,
    log: Path,
    *,
    seeds: Sequence[Sequence[float]] = (),
    provenance: Mapping[str, Any] | None = None,
    on_evaluation: Progress | None = None,
    on_generation: Progress | None = None,
) -> Result:
    """Minimise `objective` over `space`, or go on with the search that `log` has.

    Args:
        objective: called with a read-only vector. A score that is not finite, or one of FAILURES, is kept as inf with its reason.
        log: a JSONL file; see Log.
        seeds: vectors (rotary_dim/2,) to begin with, brought into the space, e.g. those of other rules.
        provenance: what else a resumed search must find unchanged (digests of the model and the documents); anything that JSON can hold.
        on_evaluation: called after each new evaluation; what it raises ends the search, which can then go on.
        on_generation: called after each generation, also one that the log had (`replayed` tells how many of its scores it had).

    Both get {generation, evaluations, total, failed, best, r, median, spread, r_histogram, replayed, seconds, eta_seconds}: best and r are
    of the best candidate, median, spread (between the quartiles) and r_histogram of the population (parents and children so far) without
    failures; seconds are those of the objective, before an interruption too.

    Raises:
        UserError: the log was begun with other settings or is damaged; no candidate at all has a finite score.

    >>> import tempfile
    >>> space = Space(rotary_dim=8, base=10000.0, original_len=64, factor=4.0, low=1.0, high=2.0, step=0.01)
    >>> varied = {"parents": 32, "mutations": 16, "crossovers": 16, "mutation_probability": 0.3}
    >>> evolution = Evolution(population=8, iterations=4, seed=0, r_moves=0.0, tries=100, budget=None, **varied)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = search(lambda factors, r: abs(factors[-1] - 5), space, evolution, Path(folder) / "log.jsonl")
    >>> found.evaluations, found.score < 0.5
    (136, True)
    """
    settings = {
        "space": asdict(space),
        "task": asdict(evolution) | {"seeds": [[float(f) for f in vector] for vector in seeds]},
        "provenance": dict(provenance or {}),
    }
    seen: set[Key] = set()
    first = first_generation(space, evolution, seeds, seen)  # before the log: what it refuses leaves no file that holds wrong settings
    with Log(log, settings) as opened:
        return _Search(objective, space, evolution, opened, seen, on_evaluation, on_generation).run(first, settings)


class _Search:
    def __init__(
        self,
        objective: Objective,
        space: Space,
        evolution: Evolution,
        log: Log,
        seen: set[Key],
        on_evaluation: Progress | None,
        on_generation: Progress | None,
    ) -> None:
        self.objective, self.space, self.evolution, self.log = objective, space, evolution, log
        self.on_evaluation, self.on_generation = on_evaluation, on_generation
        self.seen = seen
        self.population: list[Scored] = []  # parents and children
        self.best: Scored | None = None
        self.evaluations = self.failed = self.replayed = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []

    def run(self, children: list[Candidate], settings: dict[str, Any]) -> Result:
        generation = 0
        while children:
            self._score(children[: self.evolution.total - self.evaluations], generation)
            generation += 1
            if generation > self.evolution.iterations or self.evaluations >= self.evolution.total:
                break
            parents = [scored.candidate for scored in self.population[: self.evolution.parents]]
            children = next_generation(self.space, self.evolution, parents, generation, self.seen)
        best = self._found()
        return Result(
            r=best.candidate.r,
            factors=tuple(best.candidate.factors.tolist()),
            score=best.score,
            id=best.candidate.id,
            evaluations=self.evaluations,
            failed=self.failed,
            ended="budget" if children else "exhausted",
            history=tuple(self.history),
            settings=settings,
        )

    def _score(self, children: Iterable[Candidate], generation: int) -> None:
        """Score a generation; afterwards the population is its parents and it, best first."""
        self.population = self.population[: self.evolution.parents]
        self.replayed = 0
        for child in children:
            known = self.log.entries.get(child.id)
            scored = self._evaluate(child) if known is None else self._replay(child, known)
            self.evaluations += 1
            self.seconds += scored.seconds
            if math.isfinite(scored.score):
                self.population.append(scored)
            else:
                self.failed += 1
            if self.best is None or scored.score < self.best.score:
                self.best = scored
            if known is None and self.on_evaluation:
                self.on_evaluation(self._progress(generation))
        self.log.sync()
        best = self._found()
        self.population.sort(key=lambda scored: (scored.score, scored.candidate.id))
        state = self._progress(generation)
        self.history.append({"generation": generation, "best": best.score, "median": state["median"], "r": best.candidate.r})
        if self.on_generation:
            self.on_generation(state)

    def _evaluate(self, child: Candidate) -> Scored:
        factors = child.factors.copy()
        factors.flags.writeable = False
        reason = None
        start = time.perf_counter()
        try:
            score = float(self.objective(factors, child.r))
            if not math.isfinite(score):
                reason, score = f"the score is {score}", math.inf
        except FAILURES as error:
            reason, score = f"{type(error).__name__}: {error}", math.inf
        scored = Scored(child, score, time.perf_counter() - start, reason)
        self.log.append(entry(scored))
        return scored

    def _replay(self, child: Candidate, known: Mapping[str, Any]) -> Scored:
        self.replayed += 1
        scored = Scored(
            child, math.inf if known.get("score") is None else known["score"], float(known.get("seconds", 0.0)), known.get("reason")
        )
        if entry(scored) != known:
            raise UserError(
                f"{self.log.path}: evaluation {child.id} is not what these settings lead to (another version of Patchbay or numpy?); "
                "move that file away to search anew"
            )
        return scored

    def _found(self) -> Scored:
        """The best, which has a score."""
        if self.best is None or not math.isfinite(self.best.score):
            raise UserError(
                f"search: none of {self.evaluations} candidates has a finite score ({self.best.reason if self.best else 'no candidate'}); "
                f"mend the objective (shorter or fewer documents, another dtype), move {self.log.path} away and search anew"
            )
        return self.best

    def _progress(self, generation: int) -> dict[str, Any]:
        scores = [scored.score for scored in self.population]
        low, median, high = np.quantile(scores, [0.25, 0.5, 0.75]).tolist() if scores else (math.inf, math.inf, math.inf)
        left = self.evolution.total - self.evaluations
        return {
            "generation": generation,
            "evaluations": self.evaluations,
            "total": self.evolution.total,
            "failed": self.failed,
            "best": math.inf if self.best is None else self.best.score,
            "r": -1 if self.best is None else self.best.candidate.r,
            "median": median,
            "spread": high - low if scores else math.inf,
            "r_histogram": dict(sorted(Counter(scored.candidate.r for scored in self.population).items())),
            "replayed": self.replayed,
            "seconds": self.seconds,
            "eta_seconds": left * self.seconds / self.evaluations,
        }


def entry(scored: Scored) -> dict[str, Any]:
    """The line of the log; a score of inf is null there, since JSON has none."""
    child = scored.candidate
    line: dict[str, Any] = {
        "id": child.id,
        "generation": child.generation,
        "parents": list(child.parents),
        "op": child.op,
        "r": child.r,
        "factors": child.factors.tolist(),
        "score": scored.score if math.isfinite(scored.score) else None,
        "seconds": scored.seconds,
    }
    return line | ({"reason": scored.reason} if scored.reason else {})
