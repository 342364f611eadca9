"""A pipeline of stages that ask a model: each has a store of its own, named by all that decides its answers.

So a command that was killed goes on where it was, and a stage that is asked otherwise begins anew beside what is there. What is asked
is named by its words: of a changed input only what changed is asked again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.contracts import Request, Result, SamplingParams
from components.decoding.rounds import Method, Query, seed_of
from components.store import Store, request_id
from components.synthesis.calls import Call
from components.synthesis.rows import Said
from framework.decoding import setting_of
from framework.engines.building import identity
from framework.generate import Context, renderer
from framework.jobs import answer_row, run_job, say
from framework.round_jobs import CALLS, run_round_job

Calls = Callable[[], Iterable[Call]]  # read several times, and the same each time


@dataclass
class Speaker:
    """A model that stages ask. context: its run and engine."""

    context: Context

    def __post_init__(self) -> None:
        self.render, self.identity = renderer(self.context), identity(self.context.engine, self.context.source)
        run = self.context.source
        self.setting = setting_of(self.context.engine, None if run is None else run.tokenizer, self.render, self.context.params)
        self.cost = None if run is None else run.model.forward_flops

    @property
    def name(self) -> str:
        """Of the model, for a row that it wrote."""
        weights = self.identity.get("weights")
        return f"{self.context.engine.model_id}" + ("" if weights is None else f"@{weights}")

    def fits(self, prompt: str) -> bool:
        """Is there room for a prompt and for the longest reply?"""
        setting = self.setting
        return setting.limit is None or setting.count(prompt) + setting.max_new_tokens <= setting.limit


@dataclass
class Stages:
    """Asks the calls of one stage after another. folder: theirs; job, keeping: arguments of `run_job` and of `Store.open`.

    failed: calls without an answer; tokens: of prompts and answers, by stage.
    """

    folder: Path
    job: dict[str, Any]
    keeping: dict[str, Any]
    failed: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)

    def ask(self, stage: str, calls: Calls, speaker: Speaker, params: SamplingParams) -> Iterator[tuple[Call, Said | None]]:
        """Each call with its reply, in their order; None for one that was given up. Raises UserError; Interrupted."""
        space = {**speaker.identity, "sampling": dataclasses.asdict(params), "stage": stage, "task": speaker.context.task}
        asked: dict[str, Call] = {}

        def seed(call: Call) -> int:
            return seed_of(params.seed, call.name, stage)

        def requests(store: Store) -> Iterator[tuple[int, Request]]:
            for index, call in enumerate(calls()):
                if call.name not in store:
                    asked[call.name] = call
                    yield index, Request(call.name, speaker.render(call.prompt), dataclasses.replace(params, seed=seed(call)))

        def row(request: Request, result: Result) -> dict[str, Any]:
            call = asked.pop(request.id)
            return {**answer_row(request, result), "prompt": call.prompt, "documents": list(call.documents)}

        def run(store: Store, total: int, before: int) -> None:
            run_job(requests(store), speaker.context.engine, store, row=row, total=total, before=before, **self.job)

        yield from self._read(stage, self._finished(stage, space, calls, run), calls, seed)

    def answer(
        self, stage: str, calls: Calls, speaker: Speaker, method: Method, how: dict[str, Any]
    ) -> Iterator[tuple[Call, dict[str, Any] | None]]:  # fmt: skip
        """The same with a decoding of several calls: each call with what `Trace.record` says of its answer. how: the node of the method."""
        params = speaker.context.params
        space = {**speaker.identity, "sampling": dataclasses.asdict(params), "decode": how, "stage": stage, "task": speaker.context.task}

        def queries(store: Store) -> Iterator[tuple[int, Query]]:
            for index, call in enumerate(calls()):
                if call.name not in store:
                    yield index, Query(call.name, call.prompt)

        def row(query: Query, record: dict[str, Any]) -> dict[str, Any]:
            return {"prompt": query.said, **{key: value for key, value in record.items() if key not in ("id", "said", "error")}}

        def run(store: Store, total: int, before: int) -> None:
            with self._opened(store.folder / CALLS, space) as kept:
                run_round_job(
                    queries(store), method, speaker.context.engine, store, kept, render=speaker.render, setting=speaker.setting,
                    cost=speaker.cost, row=row, total=total, **self.job,
                )  # fmt: skip

        yield from self._read(stage, self._finished(stage, space, calls, run), calls, None)

    def _finished(self, stage: str, space: dict[str, Any], calls: Calls, run: Callable[[Store, int, int], None]) -> Path | None:
        """The final files of a stage, None of one without calls. run: asks what a store lacks of so many calls, of which some are done."""
        names = [call.name for call in calls()]
        if not names:
            return None
        with self._opened(self.folder / f"{stage}-{request_id(**space)[:8]}", space) as store:
            before = sum(name in store for name in names)
            if before < len(names):
                say(f"{stage}: {len(names):,} calls" + (f"; {before:,} of them are there already" if before else ""))
                run(store, len(names), before)
            return store.finish(len(names), "skip", names, others=True)

    def _opened(self, folder: Path, space: dict[str, Any]) -> Store:
        store = Store.open(folder, space=space, **self.keeping)
        for line in store.mended:
            say(f"{folder}: {line}")
        return store

    def _read(self, stage: str, final: Path | None, calls: Calls, seed: Callable[[Call], int] | None) -> Iterator[tuple[Call, Any]]:
        """Calls with their rows: as `Said` where a seed is given, else as they are."""
        if final is None:
            return
        rows = rows_of(final)
        row = next(rows, None)
        read = written = failed = 0
        for index, call in enumerate(calls()):
            if row is None or row["index"] != index:
                failed += 1
                yield call, None
                continue
            usage = row if seed is not None else row["usage"]
            own = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
            read, written = read + own[0], written + own[1]
            yield call, row if seed is None else Said(row["text"], row["finish_reason"], seed(call), own)
            row = next(rows, None)
        self.tokens[stage], self.failed[stage] = (read, written), failed
        if failed:
            say(f"{stage}: {failed:,} calls have no answer; why is in {final.parent / 'errors.jsonl'}")


def rows_of(final: Path) -> Iterator[dict[str, Any]]:
    """Rows of the final files of a store, in order, a row group at a time; columns of JSON text as what they hold."""
    import pyarrow.parquet as parquet

    for path in sorted(final.glob("data-*.parquet")):
        with parquet.ParquetFile(path) as file:
            coded = [one.name for one in file.schema_arrow if one.metadata and one.metadata.get(b"encoding") == b"json"]
            for group in file.iter_batches():
                for row in group.to_pylist():
                    yield {**row, **{name: json.loads(row[name]) for name in coded if row[name] is not None}}
