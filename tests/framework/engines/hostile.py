"""A server that misbehaves on demand. It is for tests of what the client does about that; what it says is no model's."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """answer: function of (path, body, number of the request from 0) -> (status, JSON or raw bytes, headers); seen: bodies."""

    daemon_threads = True

    def __init__(self, answer, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.seen, self.counts, self.lock = answer, [], Counter(), threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: else each answer waits for an acknowledgement

    def do_GET(self):
        self.reply(200, {"data": [{"id": "m", "max_model_len": 64}]}, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            number = len(self.server.seen)
            self.server.seen.append(body)
        self.reply(*self.server.answer(self.path, body, number))

    def reply(self, status, content, headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"content-length": str(len(data)), "content-type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving(answer):
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def honest(path, body, number):
    """n choices with the seed in their text, log-probabilities and ids where asked for."""
    choices = []
    for index in range(body.get("n", 1)):
        text = f"s{body.get('seed', 0) + index}"
        choice = {"index": index, "text": text, "finish_reason": "stop"}
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": [-0.5] * len(text)}
        if body.get("return_token_ids"):
            choice["token_ids"] = list(text.encode())
        choices.append(choice)
    return 200, {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 2 * len(choices)}}, {}
