"""Option task=serve: an OpenAI-compatible server over a run, with any engine."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time

from components.contracts import UserError
from components.decoding.rounds import Query
from framework.decoding import setting_of
from framework.generate import Context, run_renderer


class Serve:
    """Serves until it is interrupted. With a decoding of several calls the same run is a second model too, METHOD:NAME.

    Args:
        host, port: where; port 0 takes a free one.
        name: of the model; None: that of the run's folder.
        concurrency: requests at work at once; more wait.
        api_key_variable: environment variable with the key that callers must send; where it is not set everybody may call.

    Raises: UserError for a port that is taken or no port, a decoding that needs several queries, and where fastapi and uvicorn are
        not installed.
    """

    endless = True
    asks_in_rounds = True

    def __init__(self, host: str, port: int, name: str | None, concurrency: int, api_key_variable: str) -> None:
        if not 0 <= port < 2**16:
            raise UserError(f"task.port: {port}; 0 to 65535 are ports")
        if concurrency < 1:
            raise UserError(f"task.concurrency: {concurrency}; at least 1 is allowed")
        self.host, self.port, self.name, self.concurrency = host, port, name, concurrency
        self.key = os.environ.get(api_key_variable)

    def run(self, context: Context) -> dict[str, float]:
        """Serve; returns seconds and requests when it was interrupted."""
        try:
            import uvicorn

            from framework.server import Hub, make_app
        except ImportError as error:
            raise UserError(f"task: serve needs fastapi and uvicorn ({error}); pip install 'patchbay[serve]'") from error
        name, began = self.name or context.run.path.name, time.monotonic()
        hub = Hub(context.engine, self.concurrency)
        method = None if context.method is None else (f"{decoding_name(context.method)}:{name}", context.method)
        if method is not None:  # what cannot be answered alone says so now
            next(method[1].answer(Query("first", "x"), setting_of(context.engine, None, run_renderer(context.run), context.params)))
        app = make_app(hub, context.run, name, context.params, self.key, method)
        with self._listen() as listening:
            host, port = listening.getsockname()[:2]
            open_to = "everybody who reaches it" if self.key is None else "callers with the key"
            names, asked = (name, "") if method is None else (f"{name} and {method[0]}", f" engine.name={name}")
            print(f"serving {names} at http://{host}:{port}/v1, open to {open_to}; Ctrl-C ends it", file=sys.stderr, flush=True)
            print(
                f"try: python generate.py engine=openai engine.base_url=http://{host}:{port}/v1{asked} prompt=Once",
                file=sys.stderr,
                flush=True,
            )
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when it has shut down; here it is the normal end
                uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listening])
        seconds = time.monotonic() - began
        print(f"{hub.answered} requests answered in {seconds:.0f} s", file=sys.stderr)
        return {"requests": float(hub.answered), "seconds": seconds}

    def _listen(self) -> socket.socket:
        try:
            return socket.create_server((self.host, self.port), backlog=1024)
        except OSError as error:
            raise UserError(
                f"task.port: {self.port} on {self.host} cannot be had ({error.strerror}); take another, or 0 for a free one"
            ) from error


def decoding_name(method: object) -> str:
    """The name of an option of the group `decode`: its module's, as for all options."""
    return type(method).__module__.rpartition(".")[2]
