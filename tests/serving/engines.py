"""A small run, and each engine over it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from components.contracts import SamplingParams
from components.data.tokenizers import bytes_tokenizer
from framework import build, convert
from framework.engines.building import build_engine

ROOT = Path(__file__).resolve().parent.parent.parent
VLLM, SERVE = ROOT / ".venv-vllm/bin/python", ROOT / ".venv-serve/bin/transformers"
LENGTH = 256
GREEDY = SamplingParams(max_new_tokens=24, temperature=0)
DRAWN = SamplingParams(max_new_tokens=24, temperature=1.0, seed=7)

# What each can do; a change of this table is a change of an engine, or of a server's version.
PLAIN = {"n", "seed", "logprobs", "token_ids", "score", "top_k", "min_p", "repetition_penalty", "stop_ids", "ignore_eos"}
SERVED = PLAIN | {
    "alternatives", "pieces", "ids", "texts", "choice", "regex", "logit_bias",
}  # fmt: skip
ABLE = {"native": None, "transformers": PLAIN, "vllm": SERVED, "ours_served": SERVED - {"logit_bias"}, "openai_serve": {"pieces", "texts"}}


def make_run(folder, *more):
    """A run directory of random weights, with answers that vary and no ties (see test_vllm.py). more: words of its configuration."""
    words = ["model=phi4mini", "model/size=tiny", "model.num_layers=2", f"model.max_length={LENGTH}", "rope=none", *more]
    config = build.compose("train", words)
    tokenizer = bytes_tokenizer()
    model = build.build_model(config, tokenizer.vocab_size)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_((0.05 if name == "embed_tokens.weight" else 0.07) * noise if parameter.dim() > 1 else 1 + 0.2 * noise)
        model.embed_tokens.weight[256:] *= 0.05
    config.model.vocab_size = model.vocab_size
    convert.write_run(folder, "phi4mini", config, model.state_dict())
    tokenizer.save(folder / "tokenizer")
    return folder


@contextmanager
def opened(kind, home):
    """The engine over the run in `home`, which is made where it is missing: one that knows conversations."""
    folder = home / "run"
    if not folder.exists():
        make_run(folder, "data=chat", "data.path=none.jsonl", "task=sft")
    run = build.load_run(folder)
    words = {
        "native": ["engine=native"],
        "transformers": ["engine=transformers"],
        "vllm": ["engine=vllm", f"engine.python={VLLM}", "engine.arguments.max_num_seqs=16", "engine.arguments.enforce_eager=true"],
    }
    if kind == "ours_served":
        with served(run, f"engine.context_length={LENGTH}") as url:
            yield build_engine(node(["engine=openai", f"engine.base_url={url}"]), run, home / "cache")
        return
    if kind == "openai_serve":
        with served_by_transformers(run, home) as (url, name):
            yield build_engine(node(["engine=openai", f"engine.base_url={url}", f"engine.name='{name}'"]), run, home / "cache")
        return
    assert kind != "vllm" or VLLM.is_file(), "no vLLM: make test-vllm makes .venv-vllm first"
    engine = build_engine(node(words[kind]), run, home / "cache")
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def served(run, *words, key=None):
    """Our own server over the run, as a process of its own; yields its URL, and ends it as Ctrl-C does."""
    places = [f"ckpt={run.path}", "task.port=0", f"hydra.run.dir={run.path.parent / 'served'}"]
    environment = {**os.environ, **({"PATCHBAY_API_KEY": key} if key else {})}
    command = [sys.executable, ROOT / "generate.py", "task=serve", *places, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("try:"):
                break
        yield re.search(r"at (http\S+/v1)", "".join(said))[1]
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
        assert "requests answered in" in rest and "Traceback" not in rest, rest


def node(words):
    return build.compose("generate", [*words, "ckpt=unused"]).engine


@contextmanager
def served_by_transformers(run, home):
    """`transformers serve` on the run's export: a server that ignores much of what it is asked. Yields its URL and the model's name."""
    from framework.engines.building import exported

    assert SERVE.is_file(), "no transformers serve: make test-serve makes .venv-serve first"
    folder = exported(run, "transformers", home / "cache", None).resolve()
    (home / "hub").mkdir(exist_ok=True)  # without it /v1/models answers 500
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [SERVE, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    with (home / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        until = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < until, (home / "serve.log").read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code < 500:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)
