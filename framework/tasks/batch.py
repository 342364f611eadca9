"""Option task=batch: a file of prompts into a folder of answers, whatever happens to the process in between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from components.contracts import Request, Result, UserError
from components.decoding.rounds import Query, each_with_other, seed_of
from components.store import Store, count_distinct, request_id
from framework.decoding import seeded, setting_of
from framework.engines.building import identity
from framework.engines.fitting import words
from framework.generate import Context, measures, renderer, tokens_of
from framework.jobs import answer_row, run_job, say
from framework.prompts import Request as Asked
from framework.prompts import parse_request
from framework.round_jobs import CALLS, run_round_job


class Batch:
    """Answers a JSONL file of prompts into a folder; the same command goes on where a killed one was, and asks nothing twice that it kept.

    Every request has its own seed, from the run's seed and its name, so that the final files are the same bytes however often the command
    was stopped, as far as the engine itself repeats. With a decoding of several calls every call is kept too, in the folder `calls`, so
    that one that was stopped between two rounds goes on with the second.

    Args:
        prompts: file; output: folder; n: answers to every prompt.
        concurrency, max_attempts, grace_s, progress_s: see `run_job`.
        missing, on_change, repair, fsync_rows, fsync_seconds, shard_bytes: see `Store`.

    Raises: UserError for no file or folder, and values that are not allowed.
    """

    asks_in_rounds = True
    heeds_too_long = True

    def __init__(
        self, prompts: str | None, output: str | None, n: int, concurrency: int, max_attempts: int, missing: Literal["refuse", "skip"],
        on_change: Literal["refuse", "new"], repair: bool, grace_s: float, progress_s: float, fsync_rows: int, fsync_seconds: float,
        shard_bytes: int,
    ) -> None:  # fmt: skip
        if prompts is None or output is None:
            raise UserError("task: batch needs prompts=FILE.jsonl and output=DIR, a folder that the same command finds again")
        for key, value in (("n", n), ("task.concurrency", concurrency), ("task.max_attempts", max_attempts)):
            if value < 1:
                raise UserError(f"{key}: {value}; at least 1 is allowed")
        if missing not in ("refuse", "skip"):
            raise UserError(f"task.missing: {missing!r}; refuse or skip is allowed")
        self.prompts, self.output, self.n, self.missing = Path(prompts), Path(output), n, missing
        self._asked: dict[str, Asked] = {}  # those on their way, and those that failed
        self.job: dict[str, Any] = {
            "concurrency": concurrency, "max_attempts": max_attempts, "grace_s": grace_s, "progress_s": progress_s,
        }  # fmt: skip
        self.keeping: dict[str, Any] = {
            "on_change": on_change, "repair": repair, "fsync_rows": fsync_rows, "fsync_seconds": fsync_seconds, "shard_bytes": shard_bytes,
        }  # fmt: skip

    def run(self, context: Context) -> dict[str, float]:
        """Answer what is missing, then write final/; returns counts and speed."""
        if context.method is not None and self.n > 1:
            raise UserError(f"n: {self.n}; this decoding makes one answer from several calls (decode.n); drop n")
        total = count_distinct(name for name, _, _ in self._named())  # also: can all of it be read?
        began = time.monotonic()
        with Store.open(self.output, space=self._space(context), **self.keeping) as store:
            for line in store.mended:
                say(f"{self.output}: {line}")
            before = len(store)
            if before and (strange := before - sum(name in store for name, _, _ in self._named())):
                raise UserError(
                    f"{self.output}: {strange:,} of its answers are to prompts that {self.prompts} does not hold now; the file changed "
                    "(lines without an id are known by their place): take another output, or task.on_change=new with other settings"
                )
            if before:
                say(f"{before:,} of {total:,} answers are in {self.output} already")
            tokens = tokens_of(context.engine)
            if context.method is None:
                run_job(self._requests(context, store), context.engine, store, row=self._row, total=total, **self.job)
            else:
                self._in_rounds(context, store, total)
            lost = total - len(store)
            if lost:
                say(f"{lost:,} requests have no answer; why is in {self.output / 'errors.jsonl'}")
            final = store.finish(total, self.missing, (name for name, _, _ in self._named()))
            answered = len(store) - before
        if told := words(long := treated(final)):
            say(f"{told}; see prompt_cut and finish_reason in {final}")
        done = total - lost - int(long["prompts_skipped"])
        say(f'{done:,} answers in {final}. Next: datasets.load_dataset("parquet", data_dir={str(final)!r}, split="train")')
        return {**measures(tokens_of(context.engine) - tokens, time.monotonic() - began, answered), "errors": float(lost), **long}

    def _in_rounds(self, context: Context, store: Store, total: int) -> None:
        """Answer what is missing in several calls each; the calls are kept in a store of their own."""
        assert context.method is not None
        render, run = renderer(context), context.source
        tokenizer, cost = (None, None) if run is None else (run.tokenizer, run.model.forward_flops)
        setting = setting_of(context.engine, tokenizer, render, context.params)

        def named() -> Iterator[Query]:
            for name, asked, where in self._named():
                if name not in store:
                    render(asked.given, where=where)  # what cannot be read is said with its line
                    self._asked[name] = asked
                yield Query(name, asked.given)

        def row(query: Query, record: dict[str, Any]) -> dict[str, Any]:
            asked = self._asked.pop(str(query.id))
            kept = {key: value for key, value in record.items() if key not in ("id", "said", "error")}
            return {"id": str(asked.id), "prompt": asked.given, **kept}

        with Store.open(self.output / CALLS, space=self._space(context), **self.keeping) as calls:
            for line in calls.mended:
                say(f"{calls.folder}: {line}")
            queries = enumerate(each_with_other(named()))
            _, reused = run_round_job(
                queries, context.method, context.engine, store, calls, render=render, setting=setting, cost=cost, row=row, total=total,
                **self.job,
            )  # fmt: skip
            say(
                f"{len(calls):,} calls are in {calls.folder}" + (f"; {reused:,} of unfinished answers were there already" if reused else "")
            )

    def _space(self, context: Context) -> dict[str, Any]:
        """Everything that decides the answers but the prompts."""
        found = {
            **identity(context.engine, context.source), "sampling": dataclasses.asdict(context.params), "n": self.n, "task": context.task,
        }  # fmt: skip
        return found if context.method is None else {**found, "decode": context.how}

    def _lines(self) -> Iterator[tuple[str, str]]:
        """(line, file and number) of each prompt. Raises UserError for a file that is not there, not UTF-8, or empty."""
        some = False
        try:
            with self.prompts.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        some = True
                        yield line, f"{self.prompts}: line {number}"
        except UnicodeDecodeError as error:
            raise UserError(f"{self.prompts}: is not UTF-8 ({error.reason}); save the file as UTF-8") from error
        except OSError as error:
            raise UserError(f"prompts: {str(self.prompts)!r} cannot be read ({error.strerror or error}); give a JSONL file") from error
        if not some:
            raise UserError(f'{self.prompts}: empty; give one JSON object a line, such as {{"prompt": "Once"}}')

    def _named(self) -> Iterator[tuple[str, Asked, str]]:
        """(name, prompt, file and number) in the order of the file. A name is what is asked and its id, or its place where it has none."""
        for index, (line, where) in enumerate(self._lines()):
            asked = parse_request(line, where, index)
            yield request_id(prompt=asked.given, id=asked.id), asked, where

    def _requests(self, context: Context, store: Store) -> Iterator[tuple[int, Request]]:
        """The requests in the order of the file."""
        render = renderer(context)
        for index, (name, asked, where) in enumerate(self._named()):
            params = dataclasses.replace(context.params, seed=seed_of(context.params.seed, name, "sample"))
            if name not in store:
                self._asked[name] = asked
            yield index, Request(name, render(asked.given, where=where), seeded(context.engine, params), self.n)

    def _row(self, request: Request, result: Result) -> dict[str, Any]:
        """What is kept of an answer: the prompt as it was given, under the file's own id, in the place of its token ids."""
        asked = self._asked.pop(request.id)
        return {"id": str(asked.id), **answer_row(request, result), "prompt": asked.given}


def treated(final: Path) -> dict[str, float]:
    """How many prompts of the final files were cut and passed over, in whichever start of the command."""
    import pyarrow.parquet as pq

    found = {"prompts_cut": 0.0, "prompts_skipped": 0.0}
    for path in sorted(final.glob("*.parquet")):
        file = pq.ParquetFile(path)
        columns = [name for name in ("finish_reason", "prompt_cut") if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns) if columns else ():
            rows = batch.to_pydict()
            found["prompts_skipped"] += sum("skipped" in (reason or "") for reason in rows.get("finish_reason", ()))
            found["prompts_cut"] += sum(bool(cut) for cut in rows.get("prompt_cut", ()))
    return found
