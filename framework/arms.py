"""The material of a claim: the node `claim` of an experiment, the jobs of its sweep sorted into arms, and what a first stage chose.

Imports nothing heavy: the resolver `${tuned:KEY}` works while a configuration is composed. framework/claims.py judges.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from components.contracts import UserError
from framework import bounds
from framework.overrides import CONF
from framework.runs import STATE_FILE, read_state, refuse_scripted
from framework.signatures import nearest

TESTS = ("paired_t", "welch_t", "bounds")
AXES = ("end", "tokens", "seconds", "training_seconds")


@dataclass
class Claim:
    """The node `claim` of an experiment: the first arm is better than each other one by at least the threshold, or figures keep bounds."""

    statement: str
    metric: str  # a key of metrics.json
    arms: dict[str, dict[str, Any]]  # {name: {group or key: value}}: a job belongs to the arm whose words it fulfils
    test: str  # paired_t: over the differences of equal seeds | welch_t | bounds: the lines of `require`, see framework/bounds.py
    seeds: list[int]
    budget_minutes: float  # of training, all runs together
    threshold: dict[str, float] = field(default_factory=dict)  # {axis: least gain}, axis one of AXES; a plain number is for "end"
    require: list[dict[str, Any]] = field(default_factory=list)  # of test: bounds, in place of the threshold
    # Arms that the first is compared with, the others are shown; empty: all are compared. {arm: its rivals} compares several.
    rivals: list[str] | dict[str, list[str]] = field(default_factory=list)
    tunes: list[str] = field(default_factory=list)  # keys that a first stage chose for each arm
    show: list[str] = field(default_factory=list)  # further metrics for the table of the verdict
    better: str = "lower"  # lower | higher
    level: float = 0.95  # of the confidence interval

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(arm, rival) that are compared."""
        first, *others = self.arms
        against = self.rivals if isinstance(self.rivals, Mapping) and self.rivals else {first: self.rivals or others}
        return [(arm, other) for arm, some in against.items() for other in some]


REQUIRED = ("statement", "metric", "arms", "test", "seeds", "budget_minutes")


def problems(node: Any) -> Iterator[str]:
    """What is wrong with a `claim` node (plain containers), one line each; null is right."""
    if node is None:
        return
    if not isinstance(node, dict):
        yield f"claim: {node!r} is not a mapping with {', '.join(REQUIRED)}"
        return
    known = tuple(Claim.__dataclass_fields__)
    yield from (f"claim.{key}: unknown key; one of {', '.join(known)}{nearest(str(key), known)}" for key in node if key not in known)
    wanted = (*REQUIRED, "require" if node.get("test") == "bounds" else "threshold")
    missing = [key for key in wanted if node.get(key) in (None, "", [], {})]
    yield from (f"claim.{key}: no value given" for key in missing)
    if missing:
        return
    threshold, arms = node.get("threshold") or {}, node["arms"]
    least = 1 if node["test"] == "bounds" else 2  # figures of one arm can keep bounds
    if not isinstance(arms, dict) or len(arms) < least or not all(isinstance(words, dict) and words for words in arms.values()):
        yield f"claim.arms: {arms!r}; at least {'one' if least == 1 else 'two'} of NAME: {{group or key: value}}"
    elif node["test"] == "bounds":
        yield from bounds.problems(node["require"], arms)
    else:
        first, rivals = next(iter(arms)), node.get("rivals") or []
        for arm, some in rivals.items() if isinstance(rivals, dict) else [(first, rivals)]:
            if arm not in arms:
                yield f"claim.rivals: {arm!r} is not one of {', '.join(arms)}{nearest(str(arm), list(arms))}"
            for name in some:
                if name not in (others := [other for other in arms if other != arm]):
                    yield f"claim.rivals: {name!r} is not one of {', '.join(others)}{nearest(str(name), others)}"
    for axis, least in (threshold if isinstance(threshold, dict) else {"end": threshold}).items():
        if axis not in AXES:
            yield f"claim.threshold.{axis}: not an axis; one of {', '.join(AXES)}{nearest(str(axis), AXES)}"
        if isinstance(least, bool) or not isinstance(least, int | float) or not math.isfinite(least):
            yield f"claim.threshold.{axis}: {least!r} is not a number"
    for key, allowed in (("test", TESTS), ("better", ("lower", "higher"))):
        if node.get(key, allowed[0]) not in allowed:
            yield f"claim.{key}: {node[key]!r} is not one of {', '.join(allowed)}{nearest(str(node[key]), allowed)}"
    if not isinstance(node["seeds"], list) or len(set(node["seeds"])) != len(node["seeds"]):
        yield f"claim.seeds: {node['seeds']!r} is not a list of different seeds"
    if not 0 < float(node.get("level", 0.95)) < 1:
        yield f"claim.level: {node['level']} is out of range; above 0 and below 1"


def read_claim(node: Any) -> Claim:
    """The claim of a plain `claim` node.

    Raises:
        UserError: it is not one; all problems on lines of their own.
    """
    if lines := list(problems(node)) or ([] if node else ["claim: there is none"]):
        raise UserError("\n".join(lines))
    least = node.get("threshold") or {}
    threshold = least if isinstance(least, dict) else {"end": least}
    return Claim(**{**node, "threshold": {axis: float(least) for axis, least in threshold.items()}})


def claim_hash(node: Any) -> str:
    """16 hex digits of a claim node: independent of anything else in the file, of the order of keys (but for the arms) and of 1 or 1.0."""

    def canonical(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): canonical(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [canonical(inner) for inner in value]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    if isinstance(node, Mapping) and isinstance(node.get("arms"), Mapping):
        node = {**node, "arms": [[name, words] for name, words in node["arms"].items()]}  # the first one is claimed to be better
    return hashlib.sha256(json.dumps(canonical(node), sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


def declared(experiment: str | None) -> Any:
    """The claim as conf/experiment/EXPERIMENT.yaml has it now, None where there is no such file or claim."""
    return plain(OmegaConf.select(config, "claim")) if (config := composed(experiment)) is not None else None


def asked_for(jobs: list[Job]) -> set[str]:
    """Keys that the jobs' experiments leave to the command (`???`), such as `data.path`."""
    from framework.build import missing

    configs = map(composed, {job.choices.get("experiment") for job in jobs})
    return {key for config in configs if config is not None for key in missing(OmegaConf.to_container(config))}


def composed(experiment: str | None) -> DictConfig | None:
    """train.yaml with the experiment as its file is now, None where there is no such file."""
    import hydra

    from framework import resolvers
    from framework.overrides import config_loader

    if not experiment or not (CONF / "experiment" / f"{experiment}.yaml").is_file():
        return None
    resolvers.register()
    with config_loader():
        return hydra.compose("train", [f"experiment={experiment}"])


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


# ------------------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    """What a job of a sweep left in its folder."""

    path: Path
    config: DictConfig
    choices: dict[str, Any]  # option of every group
    words: list[str]  # overrides, those of the sweep included
    state: dict[str, Any]
    metrics: dict[str, float]

    @property
    def done(self) -> bool:
        return self.state.get("status") == "done" and bool(self.metrics)

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    def value(self, metric: str) -> float | None:
        """Final value of a metric; None where it was not measured or is not finite."""
        value = self.metrics.get(metric) if self.done else None
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def rows(self) -> list[dict[str, float]]:
        """Rows of metrics.csv, with training_seconds: what the steps alone took, summed from tokens and speed of every row."""
        from framework.logging import read_rows

        tokens, seconds, rows = 0.0, 0.0, read_rows(self.path)
        for row in rows:
            if row.get("perf/tokens_per_second"):
                seconds += (row["tokens"] - tokens) / row["perf/tokens_per_second"]
                tokens = row["tokens"]
            row["training_seconds"] = seconds
        return rows

    def total(self, axis: str) -> float:
        """How far the run went along an axis."""
        if axis == "training_seconds":
            return self.metrics["tokens"] / self.metrics["perf/tokens_per_second"]
        return self.metrics[axis]

    def value_at(self, metric: str, axis: str, amount: float) -> float | None:
        """The metric where the run had used `amount` of an axis: the final one at its end, else interpolated between rows that have it."""
        import numpy as np

        if axis == "end" or self.total(axis) <= amount * (1 + 1e-9):
            return self.value(metric)
        points = [(row[axis], row[metric]) for row in self.rows() if axis in row and metric in row]
        if not points or amount < points[0][0]:
            return None
        value = float(np.interp(amount, [x for x, _ in points], [y for _, y in points]))
        return value if math.isfinite(value) else None


def read_jobs(folder: Path) -> list[Job]:
    """Every job below a folder, in the order of the folders' numbers.

    Raises:
        UserError: no such folder, or no runs in it.
    """
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a directory; give the folder of a sweep, such as multirun/NAME/DATE")
    found = {file.parent for file in folder.glob(f"**/{STATE_FILE}")} | {file.parent.parent for file in folder.glob("**/.hydra/hydra.yaml")}
    if not found:
        raise UserError(f"{str(folder)!r} holds no runs; give the folder of a sweep, such as multirun/NAME/DATE")
    number = {path: int(head) if (head := path.name.partition("_")[0]).isdigit() else 0 for path in found}
    return [read_job(path) for path in sorted(found, key=lambda path: (number[path], path))]


def read_job(path: Path) -> Job:
    """One job; what it has not written is empty. Raises UserError for a file that cannot be read, and for a scripted engine."""
    from framework.build import read_config

    config = read_config(path) if (path / "config.yaml").is_file() else DictConfig({})
    hydra = stored_hydra(path / ".hydra" / "hydra.yaml")
    metrics = {}
    if (path / "metrics.json").is_file():
        try:
            metrics = json.loads((path / "metrics.json").read_text())
        except ValueError as error:
            raise UserError(f"{path / 'metrics.json'}: cannot be read ({error})") from error
        refuse_scripted(path, metrics.get("engine"))
    choices = {group: option for group, option in hydra.get("runtime", {}).get("choices", {}).items() if option not in (None, "null")}
    return Job(path, config, choices, list(hydra.get("overrides", {}).get("task", [])), read_state(path), metrics)


def stored_hydra(file: Path) -> dict[str, Any]:
    """The node `hydra` that Hydra stored for a job or a sweep, unresolved; {} where it cannot be read."""
    try:
        node = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the file is long: the compiled reader
    except (OSError, yaml.YAMLError):
        return {}
    return (node or {}).get("hydra") or {}


def arm_of(claim: Claim, choices: Mapping[str, Any], config: DictConfig) -> str | None:
    """The arm whose words a job fulfils; None for none."""

    def fulfils(key: str, wanted: Any) -> bool:
        if key in choices:
            return str(choices[key]) == str(wanted)
        node, option = OmegaConf.select(config, key), CONF / key / f"{wanted}.yaml"
        if not isinstance(node, DictConfig):
            return plain(node) == wanted
        if option.is_file():  # without Hydra's own record, the class tells the option
            return node.get("_target_") == OmegaConf.select(OmegaConf.load(option), "_target_")
        return plain(node) == wanted

    return next((name for name, words in claim.arms.items() if all(fulfils(*word) for word in words.items())), None)


# ------------------------------------------------------------------------------------------------------------ first stage


def first_stage(folder: Path, claim: Claim, jobs: list[Job] | None = None) -> dict[str, dict[str, Any]]:
    """What a first stage found for every arm: {arm: {points: [{KEY.., value, runs}], best: {KEY: value}, at_edge: [KEY..]}}.

    A point's value is the mean of the metric over its runs, None where one of them failed. at_edge: keys whose best value is the
    smallest or largest that was tried, so that a better one may lie beyond. jobs: of the folder, where they were read before.

    Raises:
        UserError: no such folder, or an arm without a finished point.
    """
    found: dict[str, dict[str, Any]] = {}
    jobs = read_jobs(folder) if jobs is None else jobs
    for arm in claim.arms:
        points: dict[tuple, list[Job]] = {}
        for job in jobs:
            if arm_of(claim, job.choices, job.config) == arm:
                points.setdefault(tuple(plain(OmegaConf.select(job.config, key)) for key in claim.tunes), []).append(job)
        rows = []
        for values, members in points.items():
            scores = [job.value(claim.metric) for job in members]
            mean = None if None in scores else math.fsum(scores) / len(scores)  # type: ignore[arg-type]
            rows.append({**dict(zip(claim.tunes, values)), "value": mean, "runs": len(members)})
        scored = [row for row in rows if row["value"] is not None]
        if not scored:
            raise UserError(f"stage_one: {str(folder)!r} holds no finished run of the arm {arm!r} with {claim.metric}")
        best = (min if claim.better == "lower" else max)(scored, key=lambda row: row["value"])
        edges = [key for key in claim.tunes if len(rows) > 1 and best[key] in (min(r[key] for r in rows), max(r[key] for r in rows))]
        found[arm] = {"points": rows, "best": {key: best[key] for key in claim.tunes}, "at_edge": edges}
    return found


def tuned(key: str, config: DictConfig) -> Any:
    """The resolver `${tuned:KEY}`: the value of KEY that the first stage, `stage_one: DIR`, found best for this job's arm.

    Raises:
        UserError: no first stage, KEY is not tuned by it, or this job belongs to no arm.
    """
    from hydra.core.hydra_config import HydraConfig

    claim, folder = read_claim(plain(OmegaConf.select(config, "claim"))), OmegaConf.select(config, "stage_one")
    if key not in claim.tunes:
        raise UserError(f"claim.tunes: {claim.tunes} does not name {key}")
    if not folder:
        raise UserError(f"stage_one: no value given; the folder of the first stage, which chose {key}: stage_one=multirun/NAME/DATE")
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    arm = arm_of(claim, choices, config)
    if arm is None:
        raise UserError(f"claim.arms: this job is of none of {', '.join(claim.arms)}")
    return best_points(str(Path(folder).resolve()), json.dumps(asdict(claim)))[arm][key]


@functools.lru_cache(maxsize=8)
def best_points(folder: str, claim: str) -> dict[str, dict[str, Any]]:
    """{arm: {key: value}} of a first stage, read once a process: every job of the second stage resolves it several times."""
    return {arm: found["best"] for arm, found in first_stage(Path(folder), Claim(**json.loads(claim))).items()}


def run_of(folder: str, words: Sequence[str], config: DictConfig) -> str:
    """The resolver `${run_of:DIR,KEY=VALUE,...}`: the finished run below DIR that has these options or values.

    Its seed is this job's, unless the words name one (`seed=1`: all seeds go on from one run).

    Raises:
        UserError: there is none, or more than one.
    """
    if not folder:
        raise UserError("run_of: no folder given; the folder of an earlier sweep, such as multirun/NAME/DATE")
    return _run_of(str(Path(folder).resolve()), tuple(words), int(config.seed))


@functools.lru_cache(maxsize=64)
def _run_of(folder: str, words: tuple[str, ...], seed: int) -> str:
    wanted = dict(word.split("=", 1) for word in words)
    wanted.setdefault("seed", str(seed))

    def has(job: Job, key: str, value: str) -> bool:
        return str(job.choices[key] if key in job.choices else OmegaConf.select(job.config, key)) == value

    found = [job.path for job in read_jobs(Path(folder)) if job.done and all(has(job, *word) for word in wanted.items())]
    if len(found) != 1:
        told = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise UserError(f"{folder!r} holds {len(found)} finished runs with {told}; exactly one is needed")
    return str(found[0])
