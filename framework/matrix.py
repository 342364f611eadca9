"""The interchange matrix: every combination of options is trained for two steps, or refused for a reason that is on record."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import logging
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.progress import Progress

from components.contracts import Data, UserError
from framework import build, entry, overrides
from framework.cells import (
    CROSS,
    SEED,
    STEPS,
    Cell,
    Outcome,
    Rule,
    cross_cells,
    defaults,
    fits,
    label,
    legal_cells,
    mark_twins,
    read_rules,
    single_cells,
    verdict,
)  # fmt: skip
from framework.logging import read_rows
from framework.runs import replace_file
from framework.trial import Trial, moved_wrongly, resumed_wrongly

ENTRY = Path(__file__).resolve().parent.parent / "train.py"
FEWER = {"train_documents": "200", "val_documents": "20", "train_problems": "200", "val_problems": "20"}  # of data made on the spot


class Bench:
    """Where cells are tried: a small text, data prepared once, configurations composed once an option.

    folder: for the text, the cache and the runs; an existing one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rules, self.still, self.twins = read_rules()
        self.text = folder / "text.jsonl"  # rows that every kind of data can read
        self.text.write_text("".join(json.dumps(row) + "\n" for row in _rows(400)))
        self.small: Cell = {
            "model/size": "test", "data": "text", "data.tokenizer.kind": "bytes", "data.seq_len": "48", "data.batch_size": "2",
            "model.max_length": "12",  # below a window's length, so that every rope rule acts
            "trainer.max_steps": str(STEPS), "seed": str(SEED), "logger": "none", "paths.cache_dir": str(folder / "cache"),
        }  # fmt: skip
        self._data: dict[str, Data] = {}
        self._configs: dict[tuple[tuple[str, str], ...], DictConfig] = {}

    def words(self, cell: Cell) -> list[str]:
        """The command line of a cell, with the file that its data option may ask for."""
        whole = {**self.small, **cell}
        option = yaml.safe_load((overrides.CONF / "data" / f"{whole['data']}.yaml").read_text())
        whole |= {f"data.{key}": self._asked(key) for key, value in option.items() if value == "???"}
        whole |= {f"data.{key}": value for key, value in FEWER.items() if key in option}
        return [f"{key}={value}" for key, value in whole.items()]

    def _asked(self, key: str) -> str:
        """What a data option gets that asks for files: the text, or two tasks of it."""
        return f"{{one: {{path: {self.text}}}, two: {{path: {self.text}}}}}" if key == "tasks" else str(self.text)

    def run_words(self, cell: Cell) -> list[str]:
        """As `words`, for a whole run: a checkpoint at its end, rows that hold any probe."""
        quiet = {"checkpoint.every_steps": "2", "validate.every_steps": "100", "samples.every_steps": "0", "trainer.log_every_n_steps": "1"}
        return self.words({"data.seq_len": "160", **quiet, **cell})

    def config(self, cell: Cell) -> DictConfig:
        """The validated configuration of a cross cell.

        Hydra takes a tenth of a second a time, so each option is composed once and its node put into the configuration of the model. A test
        compares with the composed whole.

        Raises:
            UserError: the combination is refused.
        """
        config = copy.deepcopy(self._composed({key: value for key, value in cell.items() if key not in CROSS or key == "model"}))
        for group in CROSS[1:]:
            if group in cell:
                with open_dict(config):
                    config[group] = self._composed({group: cell[group]})[group]
        build.check(config)
        return config

    def _composed(self, cell: Cell) -> DictConfig:
        key = tuple(cell.items())
        if key not in self._configs:
            self._configs[key] = build.compose("train", self.words(cell))
        return self._configs[key]

    def data(self, config: DictConfig) -> Data:
        """The prepared data of a configuration, built once."""
        key = OmegaConf.to_yaml(config.data, resolve=True)
        if key not in self._data:
            self._data[key] = build.build_data(config)
            self._data[key].prepare(Path(config.paths.cache_dir))
        return self._data[key]


def _rows(n: int) -> Iterator[dict[str, Any]]:
    for i in range(n):
        question, answer = f"What is {i} times {i + 7}? ", f"{i} times {i + 7} is {i * (i + 7)}."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row = {"text": question + answer, "prompt": question, "completion": answer, "question": question, "answer": answer}
        yield row | {"id": f"{i:032x}", "level": i % 3 + 1, "messages": messages}


def run_cell(bench: Bench, cell: Cell) -> Outcome:
    """Try a cell of the cross product: two steps, what moved, state dict, resume. Never raises what a cell raises."""
    outcome = Outcome(cell)
    return guarded(outcome, lambda: _train_cell(bench, outcome))


def guarded(outcome: Outcome, attempt: Callable[[], None]) -> Outcome:
    """Make an outcome of whatever `attempt` raises."""
    try:
        attempt()
    except UserError as error:
        outcome.status, outcome.message, outcome.error = "refused", str(error), error
    except Exception as error:
        outcome.problems.append(f"{type(error).__name__}: {overrides.first_line(error)}")
        outcome.error = error
    if outcome.problems:
        outcome.status = "failed"
    return outcome


def _train_cell(bench: Bench, outcome: Outcome) -> None:
    config = bench.config(outcome.cell)
    data = bench.data(config)
    straight = Trial(config, data, SEED)
    before = straight.weights()
    first = straight.step(measure=True)
    probe = next(iter(data.val_batches()))
    hidden, file = straight.forward(probe), straight.save()
    started = time.perf_counter()
    second = straight.step()
    outcome.seconds, outcome.loss, outcome.memory_bytes = time.perf_counter() - started, second, straight.memory_bytes()
    if not all(map(torch.isfinite, map(torch.tensor, (first, second)))):
        outcome.problems.append(f"the loss is not finite: {first}, then {second}")
    still = [entry.parameters for entry in bench.still if entry.rule.covers(outcome.cell)]
    outcome.problems += moved_wrongly(straight, before, still)
    outcome.problems += resumed_wrongly(straight, Trial(config, data, SEED + 1), file, probe, hidden, second)


def run_single(bench: Bench, cell: Cell, start: Callable[[list[str]], int]) -> Outcome:
    """Try one option as a whole run of two steps. start: runs a list of words like the command, prints, and returns its exit code."""
    outcome = Outcome(cell)
    root = bench.folder / "runs" / re.sub(r"\W+", "_", label(cell) or "default")
    code, printed = captured(start, bench.run_words({**cell, "paths.root": str(root)}))
    return judged(outcome, code, printed, root)


def judged(outcome: Outcome, code: int, printed: str, root: Path) -> Outcome:
    """Fill an outcome from a finished command: its exit code, what it printed, and the run below `root`."""
    refusals = [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]
    if code == 2 and refusals:
        outcome.status, outcome.message = "refused", "; ".join(refusals)
        return outcome
    rows = [row for file in sorted(root.glob("**/run_state.json")) for row in read_rows(file.parent)]
    if code:
        outcome.problems.append(f"exit code {code}: {printed.strip()[-300:]}")
    elif len(rows) < STEPS or rows[-1]["step"] != STEPS or not math.isfinite(rows[-1]["train/loss"]):
        outcome.problems.append(f"metrics.csv ends with {rows[-1:]}; wanted step {STEPS} and a finite loss")
    else:
        last, tokens = rows[-1], rows[-1]["tokens"] - rows[-2]["tokens"]
        outcome.loss, outcome.seconds = last["train/loss"], tokens / last["perf/tokens_per_second"]
    outcome.status = "failed" if outcome.problems else "trained"
    return outcome


def captured(start: Callable[[list[str]], int], words: list[str]) -> tuple[int, str]:
    """Exit code of a command and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = start(words)
    return code, printed.getvalue()


def run_decoding(bench: Bench, cell: Cell, run: Path, start: Callable[[list[str]], int]) -> Outcome:
    """Try one option of generate.py on a trained run. start: as in `run_single`."""
    outcome, folder = Outcome(cell), bench.folder / "generate" / re.sub(r"\W+", "_", label(cell))
    task = yaml.safe_load((overrides.CONF / "task" / f"{cell.get('task', 'answer')}.yaml").read_text())
    asked = ["prompt=What is"] if "prompt" in task else []  # other tasks bring their own questions
    words = [f"ckpt={run}", *asked, "max_new_tokens=4", "device=cpu", f"paths.output_dir={folder}"]
    code, printed = captured(start, [*words, f"paths.cache_dir={bench.folder / 'cache'}", *label(cell).split()])
    refusals = [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]
    if code == 2 and refusals:
        outcome.status, outcome.message = "refused", "; ".join(refusals)
    elif code or not (folder / "metrics.json").is_file():
        outcome.status, outcome.problems = "failed", [f"exit code {code}: {printed.strip()[-300:]}"]
    return outcome


def train_here(words: list[str]) -> int:
    """A training run in this process; one of several processes as a command of its own, because each of them starts it again."""
    try:
        from framework.train import train

        config = build.compose("train", words)
        if config.trainer.get("devices", 1) not in (1, "1", "auto") or config.trainer.get("num_nodes", 1) != 1:
            done = subprocess.run([sys.executable, str(ENTRY), *words], capture_output=True, text=True)
            print(done.stdout, done.stderr, sep="\n")
            return done.returncode
        config.paths.output_dir = str(Path(config.paths.root) / "run")
        train(config, Path(config.paths.output_dir))
    except (Exception, KeyboardInterrupt) as error:
        return entry.report(error)
    return 0


def generate_here(words: list[str]) -> int:
    """A generation in this process."""
    try:
        from framework.generate import generate

        config = build.compose("generate", words)
        generate(config, Path(config.paths.output_dir))
    except (Exception, KeyboardInterrupt) as error:
        return entry.report(error)
    return 0


def tasks(bench: Bench) -> list[tuple[Cell, Callable[[], Outcome]]]:
    """All that the published table shows, in its order, as (cell, how to try it)."""
    found: list[tuple[Cell, Callable[[], Outcome]]] = [(cell, partial(run_cell, bench, cell)) for cell in cross_cells()]
    known = [cell for cell, _ in found]
    listed = [cell for rule in bench.rules if rule.holds_here for cell in rule.cells()]
    singles = single_cells("train")
    found += [(cell, partial(run_single, bench, cell, train_here)) for cell in [*singles, *legal_cells(bench.rules)]]
    known += [*singles, *single_cells("generate")]
    found += [(cell, partial(refusal, bench, cell)) for cell in listed if cell not in known]
    run = bench.folder / "runs" / "default" / "run"
    if single_cells("generate"):
        found.append(({}, partial(run_single, bench, {}, train_here)))
    return found + [(cell, partial(run_decoding, bench, cell, run, generate_here)) for cell in single_cells("generate")]


def refusal(bench: Bench, cell: Cell) -> Outcome:
    """Try a listed cell as far as it must not get: the check of its configuration, then two steps."""
    if all(key in CROSS or "/" in key or "." in key for key in cell):
        return run_cell(bench, cell)
    generates = any(key in defaults("generate") and key not in defaults("train") for key in cell)
    if generates or ("task" in cell and not fits("train", "task", cell["task"])):
        return run_decoding(bench, cell, default_run(bench), generate_here)
    return run_single(bench, cell, train_here)


def default_run(bench: Bench) -> Path:
    """The run of all defaults, trained when it is first asked for."""
    root = bench.folder / "runs" / "default"
    if not list(root.glob("**/run_state.json")):
        run_single(bench, {}, train_here)
    return next(root.glob("**/run_state.json")).parent


def publish(out_dir: Path, every: int = 1) -> Path:
    """Try everything and write matrix.md and matrix.csv into `out_dir`; returns the path of matrix.md. A bar shows the progress.

    every: of the cells, one in so many, and the one of all defaults, whose run others answer with.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(file=sys.stderr), transient=True) as bar:
        bench = Bench(Path(folder))
        work = [one for place, one in enumerate(tasks(bench)) if place % every == 0 or not one[0]]
        line = bar.add_task("matrix", total=len(work))
        outcomes = []
        for cell, attempt in work:
            bar.update(line, description=label(cell) or "default")
            outcomes.append(attempt())
            bar.advance(line)
        mark_twins(outcomes[: len(cross_cells()[::every])], bench.twins)
        table = [row(outcome, bench.rules) for outcome in outcomes]
    replace_file(out_dir / "matrix.csv", as_csv(table))
    replace_file(out_dir / "matrix.md", as_markdown(table, time.perf_counter() - started))
    return out_dir / "matrix.md"


def row(outcome: Outcome, rules: list[Rule]) -> dict[str, str]:
    """A row of the table; status: trained, illegal (note: the reason) or WRONG (note: what is)."""
    wrong = verdict(outcome, rules)
    rule = next((rule for rule in rules if rule.holds_here and rule.covers(outcome.cell)), None)
    status = "WRONG" if wrong else "illegal" if outcome.status == "refused" else "trained"
    return {
        "cell": label(outcome.cell) or "all defaults",
        "status": status,
        "loss": "" if outcome.loss is None else f"{outcome.loss:.4f}",
        "ms_per_step": "" if outcome.seconds is None else f"{1000 * outcome.seconds:.1f}",
        "memory_kib": "" if outcome.memory_bytes is None else f"{outcome.memory_bytes / 1024:.0f}",
        "note": wrong or (rule.reason if status == "illegal" and rule else ""),
    }


def as_csv(table: list[dict[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return buffer.getvalue()


def as_markdown(table: list[dict[str, str]], seconds: float) -> str:
    """The page: what the figures are, counts, and the table."""
    counts = {status: sum(r["status"] == status for r in table) for status in ("trained", "illegal", "WRONG")}
    head = (
        "# Interchange matrix\n\nGenerated by `python -m framework.report --matrix`; do not edit. Every combination of "
        f"{', '.join(CROSS)}, and every option of the other groups alone: {STEPS} steps at `model/size=test`, default "
        f"precision (torch {torch.__version__}, {torch.get_num_threads()} threads). A combination is *trained* when its loss is finite "
        "and no other's, exactly the intended parameters were trained, its state dict comes back, and going on from a checkpoint of step 1 "
        "gives step 2 bit for bit; options of the other groups are whole runs. *Illegal* cells are refused with the message that "
        "`tests/illegal_cells.yaml` promises.\n\n"
        "loss: nats per token at the last step. ms per step: the last step, of a model far too small to compare speeds by. memory: "
        "weights, gradients, optimizer state and what the backward keeps.\n\n"
        f"{len(table)} cells: {counts['trained']} trained, {counts['illegal']} illegal, {counts['WRONG']} wrong; {seconds:.0f} s.\n\n"
    )
    lines = ["| cell | status | loss | ms per step | memory, KiB | note |", "| --- | --- | --: | --: | --: | --- |"]
    lines += ["| " + " | ".join(value.replace("|", "\\|").replace("\n", " ") for value in r.values()) + " |" for r in table]
    return head + "\n".join(lines) + "\n"
