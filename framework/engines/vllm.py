"""Option engine=vllm: a vLLM server of our own, on the run's export, spoken to as any other server is."""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import httpx

from components.contracts import Tokenizer, UserError
from framework.engines.openai import OpenAIEngine
from framework.engines.requests import Breaker, EngineError, Retry

QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
WORDS = 400  # of the log, in messages: characters
LEASH = (sys.executable, "-m", "framework.engines.leash")  # so that no server outlives us


class VLLMEngine(OpenAIEngine):
    """Starts vLLM's OpenAI server on loopback, and starts it again when it dies; requests that were on their way are asked again.

    vLLM needs other versions of transformers than we do, so it may live in an environment of its own.

    Args:
        folder: the run's export.
        tokenizer: the run's.
        python: interpreter that has vLLM; None: this one.
        arguments: of the server, by its names: {max_model_len: 4096, dtype: float32}; true is a flag, null leaves it out.
        environment: variables of the server's process.
        start_timeout_s: seconds until it must answer.
        restarts: how often it may die.
        log: file for what it prints; None: vllm.log beside the folder.
        The rest as in `OpenAIEngine`.

    Raises: UserError where vLLM is missing or does not start, with its last words.
    """

    takes = "export"
    reader: Literal["transformers", "vllm"] = "vllm"

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, python: str | None, arguments: Mapping[str, Any], environment: Mapping[str, str],
        start_timeout_s: float, restarts: int, log: str | None, concurrency: int, request_timeout_s: float, retry: Retry, breaker: Breaker,
    ) -> None:  # fmt: skip
        self.folder, self.python = Path(folder), python or sys.executable
        self.arguments, self.environment = dict(arguments), {key: str(value) for key, value in environment.items()}
        self.start_timeout_s, self.restarts = start_timeout_s, restarts
        self.log = Path(log) if log is not None else self.folder.parent / "vllm.log"
        self._port = free_port()
        self._process = self._start()
        atexit.register(self.close)
        try:
            super().__init__(tokenizer, f"http://127.0.0.1:{self._port}/v1", None, "", None, concurrency, request_timeout_s, retry, breaker)
        except BaseException:
            self.close()
            raise
        self.engine_id = "vllm"

    def command(self) -> list[str]:
        """The server's command line."""
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder.resolve()), "--host", "127.0.0.1"]
        words += ["--port", str(self._port), "--served-model-name", self.folder.name, "--generation-config", "vllm"]
        for key, value in self.arguments.items():
            flag = f"--{key.replace('_', '-')}"
            words += [flag] if value is True else [] if value in (None, False) else [flag, str(value)]
        return words

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the process and wait until it answers."""
        print(f"vLLM is starting on {self.folder} (half a minute to some minutes); it prints to {self.log}", file=sys.stderr)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which(self.python) is None:
            raise UserError(f"engine.python: {self.python!r} is no program; give the Python that has vLLM, such as .venv-vllm/bin/python")
        with self.log.open("wb") as file:
            environment = {**os.environ, **QUIET, **self.environment}
            process = subprocess.Popen([*LEASH, *self.command()], stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment)
        until = time.monotonic() + self.start_timeout_s
        while time.monotonic() < until:
            if process.poll() is not None:
                raise UserError(f"engine: vLLM ended with code {process.returncode} before it answered: {self._last_words()}")
            try:
                if httpx.get(f"http://127.0.0.1:{self._port}/health", timeout=5).status_code == 200:
                    return process
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        end(process)
        raise UserError(f"engine.start_timeout_s: vLLM did not answer in {self.start_timeout_s:g} s; its last words: {self._last_words()}")

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if re.match(r"[\w./ ]*(Error|error)\b", line)] or lines
        if telling and "No module named" in telling[-1]:
            return f"{telling[-1]}; engine.python names the Python that has vLLM (make test-vllm makes .venv-vllm/bin/python)"
        return f"{telling[-1][:WORDS] if telling else 'none'} ({self.log})"

    async def recover(self, error: EngineError) -> None:
        """Start the server again where it is dead; its callers wait, since nothing else can be done without it."""
        async with self._starting:
            if error.kind != "connection" or self._process.poll() is None:
                return
            if self.restarts == 0:
                raise UserError(f"engine.restarts: vLLM died once more than allowed: {self._last_words()}; what is finished is kept")
            self.restarts -= 1
            end(self._process)
            self._process = await asyncio.to_thread(self._start)

    async def begin(self) -> None:
        self._starting = asyncio.Lock()
        await super().begin()

    def close(self) -> None:
        """End the server."""
        atexit.unregister(self.close)
        end(self._process)


def free_port() -> int:
    """A port on loopback that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """Let go of the leash, and wait until the server is gone."""
    if process.stdin is not None:
        process.stdin.close()
    process.wait()
