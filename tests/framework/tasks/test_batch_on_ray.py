"""executor=ray on a real cluster of this machine: the same bytes as executor=local, whoever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.framework.test_generate import make_run

ROOT = Path(__file__).resolve().parents[3]
ON_RAY = ["executor=ray", "executor.workers=2", "executor.batch_size=8", "executor.object_store_bytes=200000000"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
NOISE = ("ray::", "raylet", "(pid=", "INFO ", "WARNING", "Traceback", "core_worker", "logging.cc", "usage")
LIMIT = 900  # seconds of one command on a busy machine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def has_two_cpus():
    pytest.importorskip("ray")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPUs")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_run(home / "run", "model=phi4mini", "data=text", f"data.path={__file__}", "data.tokenizer.kind=bytes")
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"No. {i}"}) + "\n" for i in range(120)))
    return home


def start(home, out, *more, task=("task=batch", "task.fsync_rows=1")) -> subprocess.Popen:
    command = [
        sys.executable, ROOT / "generate.py", f"ckpt={home / 'run'}", *task, f"prompts={home / 'prompts.jsonl'}", f"output={out}",
        "max_new_tokens=40", f"hydra.run.dir={out}.hydra", f"paths.cache_dir={home / 'cache'}", "engine.max_batch=8", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)


def finish(process) -> str:
    """Its stderr, with exit code 0."""
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and out == "", (process.returncode, out, err)
    return err


@pytest.fixture(scope="module")
def local(home):
    """final/ of executor=local."""
    finish(start(home, home / "local"))
    return final(home / "local")


def final(folder):
    return {file.name: file.read_bytes() for file in sorted((folder / "final").iterdir())}


def rows(folder) -> int:
    return sum(part.read_bytes().count(b"\n") for part in (folder / "parts").glob("*.jsonl"))


def wait_for_rows(process, folder, least) -> None:
    until = time.monotonic() + LIMIT
    while rows(folder) < least and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None and least <= rows(folder) < 120, (process.poll(), rows(folder), process.poll() and process.stderr.read())


def descendants(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def workers(process) -> list[psutil.Process]:
    """Processes that hold an engine."""
    found = []
    for child in descendants(process):
        try:
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def test_a_worker_is_killed_and_a_local_job_is_finished(home, local, tmp_path):
    """Begun with executor=local and killed, gone on with on Ray, where a worker dies."""
    first = start(home, tmp_path / "out")
    wait_for_rows(first, tmp_path / "out", 8)
    first.kill()
    first.communicate()
    second = start(home, tmp_path / "out", *ON_RAY)
    wait_for_rows(second, tmp_path / "out", rows(tmp_path / "out") + 8)
    found = workers(second)
    assert len(found) == 2
    random.Random(1).choice(found).send_signal(signal.SIGKILL)
    err = finish(second)
    assert "of 120 answers are in" in err and "executor: 2 workers on Ray" in err and "120 answers in" in err
    assert not [word for word in NOISE if word in err] and len(err.splitlines()) < 6, err
    assert final(tmp_path / "out") == local
    metrics = json.loads(Path(f"{tmp_path / 'out'}.hydra/metrics.json").read_text())
    assert metrics["engine"] == "native" and metrics["tokens"] > 0
    assert not (tmp_path / "out" / "errors.jsonl").exists() or not (tmp_path / "out" / "errors.jsonl").read_text()


def test_the_driver_is_killed(home, local, tmp_path):
    """kill -9 leaves nobody behind, and executor=local goes on."""
    out = tmp_path / "out"
    process = start(home, out, *ON_RAY)
    wait_for_rows(process, out, 8)
    children = descendants(process)
    assert workers(process)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert f"{rows(out)} of 120 answers are in" in finish(start(home, out))
    assert final(out) == local


def test_ctrl_c_keeps_what_was_answered(home, local, tmp_path):
    out = tmp_path / "out"
    process = start(home, out, *ON_RAY, "task.grace_s=0")
    wait_for_rows(process, out, 8)
    children = descendants(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "go on with the same command" in err and "Traceback" not in err, err
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive and 8 <= rows(out) < 120
    assert "answers are in" in finish(start(home, out, *ON_RAY))
    assert final(out) == local


def test_rounds(home, tmp_path):
    """Several calls an answer, in two rounds. Few queries are open at a time in the one, all in the other."""
    more = ["decode=gsa", "task.concurrency=16", "max_new_tokens=12"]
    finish(start(home, tmp_path / "here", *more))
    err = finish(start(home, tmp_path / "there", *more, *ON_RAY, "executor.batch_size=32"))
    assert final(tmp_path / "there") == final(tmp_path / "here") and "calls are in" in err


def test_answers_without_a_store(home, tmp_path):
    """task=answer goes through `completions`, in blocks that draw what the whole call draws; eval=position_loss through `score`."""

    def said(file):
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in file.read_text().splitlines()]

    def losses(folder):
        metrics = json.loads(Path(f"{folder}.hydra/metrics.json").read_text())
        return {key: value for key, value in metrics.items() if "second" not in key}

    for name, more in (("here", []), ("there", ON_RAY)):
        finish(start(home, tmp_path / f"{name}.jsonl", *more, task=("task=answer",)))
        measure = ["task=evaluate", "eval=position_loss", "prompts=null", "output=null", "eval.length=64", "eval.rows=4"]
        process = start(home, tmp_path / name, *measure, *more, task=())
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
    assert said(tmp_path / "there.jsonl") == said(tmp_path / "here.jsonl") and len(said(tmp_path / "here.jsonl")) == 120
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
