"""What runs in the processes of Ray (framework/executors/ray_engine.py): a copy of the engine, and the blocks that it answers."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf

from components.contracts import Diagnostics, Engine, Request, Result, SamplingParams, Usage, UserError

Kind = Literal["stream", "completions", "score"]
SAID = ("engine_id", "model_id", "tokenizer_id", "capabilities", "context_length", "arguments", "dtype")  # what others read off an engine
NEEDED = (
    "seed",
    "ckpt",
    "engine",
    "rope",
    "adapter",
    "device",
    "paths",
    "allow_targets",
)  # keys of generate.yaml that an engine is made from
SILENT = "unanswered: the engine ended without a word on this request"


@dataclass(frozen=True)
class Recipe:
    """How a process makes its own copy of the engine: the keys NEEDED, resolved, with the one checkpoint file that all of them load."""

    config: dict[str, Any]
    cache_dir: Path

    @classmethod
    def of(cls, config: DictConfig, checkpoint: Path | None, cache_dir: Path) -> Recipe:
        """checkpoint: None where the engine needs no run."""
        keys = {
            key: OmegaConf.to_container(config[key], resolve=True) if OmegaConf.is_config(config[key]) else config[key] for key in NEEDED
        }
        return cls({**keys, "ckpt": None if checkpoint is None else str(checkpoint.resolve())}, cache_dir.resolve())

    def engine(self) -> Engine:
        """Raises what `build_engine` raises."""
        from framework import resolvers
        from framework.engines.building import build_engine
        from framework.generate import open_run
        from framework.runtime import prepare_process

        resolvers.register()
        config = OmegaConf.create(self.config)
        prepare_process(config.seed)
        run = None if config.ckpt is None else open_run(config, config.device)
        return build_engine(config.engine, run, self.cache_dir, config.adapter.task)


def described(recipe: Recipe) -> dict[str, Any] | str:
    """What a copy of the engine says of itself (SAID), or the mistake of the user that it met."""
    try:
        engine = recipe.engine()
    except UserError as error:
        return str(error)
    try:
        return {name: getattr(engine, name) for name in SAID if hasattr(engine, name)}
    finally:
        engine.close()


class Worker:
    """An actor of Ray Data's pool. Rows in: {"ask": pickle}; out: {"said": pickle} of an answer, an exception, or figures of the engine.

    Blocks that are here at the same time share one stream of the engine, so that its slots do not run empty at the end of a block.
    Nothing is raised: Ray would count that as a failure of the process and hide the rest of the block.

    Args:
        recipe: of the engine.
        kind: which method of the engine answers.
        concurrency: of its stream.
        params: of a call with one SamplingParams for all prompts.
    """

    def __init__(self, recipe: Recipe, kind: Kind, concurrency: int, params: SamplingParams | None) -> None:
        self.engine, self.kind, self.concurrency, self.params = recipe.engine(), kind, concurrency, params
        self._told: dict[str, float] = {}  # figures of the engine that were passed on
        self._waiting: dict[str, asyncio.Future[Result]] = {}
        self._asked: asyncio.Queue[Request] | None = None  # None: no stream is under way
        self._numbers = 0
        self._alone: asyncio.Lock | None = None
        self._pump: asyncio.Task[None] | None = None

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answer a block."""
        asks = [pickle.loads(ask) for ask in batch["ask"]]
        try:
            if self.kind == "stream":
                said: list[Any] = await asyncio.gather(*(self._answer(request) for request in asks))
            else:
                self._alone = self._alone or asyncio.Lock()
                async with self._alone:
                    said = await asyncio.to_thread(self._complete if self.kind == "completions" else self._score, asks)
        except Exception as error:
            said = [error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")]
        yield {"said": np.array([pickle.dumps(one) for one in [*said, self._figures()]], dtype=object)}

    async def _answer(self, request: Request) -> Result:
        """One answer from the stream, under a name of its own: a block may come a second time while the first is still at work."""
        self._numbers += 1
        name = str(self._numbers)
        if self._asked is None:
            self._asked = asyncio.Queue()
            self._pump = asyncio.create_task(self._stream(self._asked))
        future = self._waiting[name] = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(replace(request, id=name))
        try:
            return replace(await future, request_id=request.id)
        finally:
            self._waiting.pop(name, None)

    async def _stream(self, asked: asyncio.Queue[Request]) -> None:
        """Hand answers out until the engine's stream ends, which it does only when it breaks."""

        async def requests() -> AsyncIterator[Request]:
            while True:
                yield await asked.get()

        error: BaseException | None = None
        try:
            async for result in self.engine.stream(requests(), concurrency=self.concurrency):
                if (future := self._waiting.get(result.request_id)) is not None and not future.done():
                    future.set_result(result)
        except Exception as broken:
            error = broken
        self._asked = None
        for name, future in self._waiting.items():
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(Result(name, [], Usage(), {}, self.engine.engine_id, SILENT))

    def _complete(self, asks: Sequence[tuple[int, Any, SamplingParams | None]]) -> list[Any]:
        """(place in the call, completion) of neighbouring prompts."""
        first, prompts = asks[0][0], [prompt for _, prompt, _ in asks]
        if self.params is not None:
            found = self.engine.completions(prompts, self.params, first=first)
        else:
            found = self.engine.completions(prompts, [cast(SamplingParams, own) for *_, own in asks])
        return [(first + index, completion) for index, completion in found]

    def _score(self, asks: Sequence[tuple[int, list[int]]]) -> list[Any]:
        """(place in the call, log-probabilities)."""
        scores = self.engine.score([ids for _, ids in asks])
        return [(place, score.numpy()) for (place, _), score in zip(asks, scores, strict=True)]

    def _figures(self) -> dict[str, float]:
        """What the figures of the engine have grown by since they were passed on."""
        now = self.engine.diagnostics() if isinstance(self.engine, Diagnostics) else {}
        grown = {name: value - self._told.get(name, 0.0) for name, value in now.items()}
        self._told = dict(now)
        return grown
