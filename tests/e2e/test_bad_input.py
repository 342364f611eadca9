"""Bad input: one clear line for each mistake, exit code 2, no traceback, and nothing left that resume=auto would pick.

Most cases run in one process through main(argv); a few run as real subprocesses at the end of the file.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from commands import SMALL, only_run, run, shakespeare_like, start, wait_for_step

import generate
import train
from framework.runs import newest_run

QUICK = ["trainer.max_steps=2", "logger=none", "samples.every_steps=1000", "validate.every_steps=1000"]


class Place:
    """A folder with good and bad files, and one finished run of each model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = shakespeare_like(folder / "good.txt")
        self.roots = [f"paths.root={folder / 'outputs'}", f"paths.cache_dir={folder / 'cache'}"]
        make_bad_files(folder)
        self.run = self.finished_run("one")
        self.other = self.finished_run("other", "model=phi4mini")

    def finished_run(self, name: str, *words: str) -> Path:
        argv = [*self.roots, *SMALL, *QUICK, f"data.path={self.text}", f"name={name}", "checkpoint.every_steps=1", *words]
        assert train.main(argv) == 0
        return newest_run(self.folder / "outputs" / name)

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


def make_bad_files(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("abc")
    (folder / "empty_folder").mkdir()
    (folder / "latin1.txt").write_bytes(b"caf\xe9 " * 500)
    (folder / "columns.jsonl").write_text('{"body": "x", "title": "y"}\n' * 20)
    (folder / "torn.jsonl").write_text('{"text": "fine"}\n{"text": "to')
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "wizard", "content": "ho"}]}\n' * 20)
    (folder / "torn.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model":')
    (folder / "prompts.jsonl").write_text('{"question": "why?"}\n')
    (folder / "torn_prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (folder / "not_a_run").mkdir()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


TEXT = ["data=text", "data.path={good.txt}"]
CASES = {
    "unknown option or key": [
        (["model=sambaa"], ["model", "'sambaa'", "did you mean 'samba'"]),
        (["model/size=huge"], ["model/size", "'huge'", "tiny"]),
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean 'optimizer.lr'"]),
        (["modle=samba"], ["modle", "did you mean 'model'"]),
        (["+model=samba"], ["drop the plus sign"]),
        (["seed"], ["seed", "key=value"]),
        (["+optimizer.momentumm=0.9"], ["optimizer.momentumm", "unknown key"]),
        (["checkpoint.evry_steps=3"], ["checkpoint.evry_steps", "every_steps"]),
    ],
    "wrong type": [
        (["seed=abc"], ["seed", "'abc'", "whole number"]),
        (["trainer.max_steps=ten"], ["trainer.max_steps", "'ten'", "whole number"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "'fast'", "number"]),
        (["data.seq_len=12.5"], ["data.seq_len", "12.5", "whole number"]),
        (["ema.enabled=perhaps"], ["ema.enabled", "'perhaps'", "true or false"]),
        (["data.batch_size=0"], ["data.batch_size", "0", "at least 1"]),
    ],
    "missing value": [
        (["data=text"], ["data.path", "no value"]),
        (["data=chat", "task=sft"], ["data.path", "no value"]),
        (["seed=null"], ["seed", "None"]),
        ([*TEXT, "data.tokenizer.kind=hf"], ["data.tokenizer.path"]),
    ],
    "illegal pair": [
        (["ckpt=a", "resume={run}"], ["ckpt", "resume", "exclude"]),
        (["task=sft"], ["task.loss_on", "data=chat"]),
        (["model.num_heads=5", "model.num_kv_heads=2"], ["model.num_kv_heads", "model.num_heads=5"]),
        (["trainer.precision=16-mixed"], ["trainer.precision", "trainer=gpu"]),
        (["model.position=none", "rope=yarn"], ["rope", "model.position=none"]),
        ([*TEXT, "schedule.warmup_steps=50"], ["schedule.warmup_steps", "trainer.max_steps"]),
    ],
    "missing or unreadable file": [
        (["data=text", "data.path={nowhere.txt}"], ["nowhere.txt"]),
        (["data=text", "data.path={empty_folder}/*.txt"], ["*.txt"]),
        (["ckpt={nowhere}"], ["ckpt", "nowhere", "does not exist"]),
        (["resume={nowhere}"], ["resume", "nowhere", "not a directory"]),
        (["resume={not_a_run}"], ["resume", "not a run"]),
        ([*TEXT, "data.tokenizer.kind=hf", "data.tokenizer.path={nowhere.json}"], ["nowhere.json"]),
    ],
    "wrong columns": [
        (["data=text", "data.path={columns.jsonl}"], ["columns.jsonl", "text", "body"]),
        (["data=chat", "task=sft", "data.path={columns.jsonl}"], ["columns.jsonl", "messages"]),
        (["data=chat", "task=sft", "data.path={chat.jsonl}"], ["chat.jsonl", "wizard"]),
    ],
    "empty data": [
        (["data=text", "data.path={empty.txt}"], ["empty.txt", "empty"]),
        (["data=text", "data.path={empty_folder}"], ["empty_folder"]),
        (["data=text", "data.path={short.txt}"], ["short.txt"]),
    ],
    "checkpoint of another architecture": [
        ([*TEXT, "ckpt={run}", "model=phi4mini"], ["model", "contradicts", "ckpt"]),
        ([*TEXT, "ckpt={run}", "model.hidden_size=16"], ["model.hidden_size", "contradicts"]),
        (["resume={run_unfinished}", "model.hidden_size=16"], ["model.hidden_size", "resume_force"]),
        (["resume={run_swapped}"], ["another architecture"]),
    ],
    "truncated or corrupt file": [
        (["data=text", "data.path={latin1.txt}"], ["latin1.txt", "UTF-8"]),
        (["data=text", "data.path={torn.jsonl}"], ["torn.jsonl", "line 2"]),
        (["data=text", "data.path={torn.parquet}"], ["torn.parquet"]),
        ([*TEXT, "data.tokenizer.kind=hf", "data.tokenizer.path={tokenizer.json}"], ["tokenizer.json"]),
        ([*TEXT, "ckpt={run_torn}"], ["run_torn"]),
    ],
    "no network": [
        (["data=text", "data.path=hub:nobody/nothing"], ["hub:nobody/nothing"]),
        (["data=text", "data.path=hub:"], ["hub:"]),
        (["data=chat", "task=sft", "data.path=hub:nobody/chats:en:train"], ["hub:nobody/chats"]),
    ],
    "no GPU": [
        (["trainer=gpu"], ["trainer.accelerator", "no CUDA"]),
        (["trainer.accelerator=cuda"], ["trainer.accelerator", "no CUDA"]),
        ([*TEXT, "trainer.accelerator=tpu"], ["trainer"]),
    ],
    "NaN loss": [
        (
            [*TEXT, "optimizer.lr=1e30", "trainer.max_steps=20", "schedule=constant", "trainer.precision=32-true"],
            ["is not finite at step", "batch"],
        ),
        (
            [*TEXT, "optimizer=muon", "optimizer.lr=1e30", "optimizer.adamw_lr=1e30", "trainer.max_steps=20", "schedule=constant"],
            ["is not finite at step", "batch"],
        ),
        ([*TEXT, "model=phi4mini", "optimizer.lr=1e30", "trainer.max_steps=20", "schedule=constant"], ["is not finite at step", "batch"]),
    ],
}


@pytest.fixture(scope="module")
def broken_runs(place):
    """Copies of a good run, each broken in one way."""
    copies = {}
    for name in ("run_unfinished", "run_swapped", "run_torn"):
        copies[name] = place.folder / name
        shutil.copytree(place.run, copies[name], symlinks=True)
    for name in ("run_unfinished", "run_swapped"):
        state = json.loads((copies[name] / "run_state.json").read_text())
        (copies[name] / "run_state.json").write_text(json.dumps({**state, "status": "running"}))
    for file in (copies["run_swapped"] / "checkpoints").glob("*.ckpt"):
        shutil.copy(sorted((place.other / "checkpoints").glob("*.ckpt"))[-1], file)
    for file in (copies["run_torn"] / "checkpoints").glob("*.ckpt"):
        os.truncate(file, file.stat().st_size // 2)
    return copies


def check_refusal(code: int, err: str, words: list[str]) -> None:
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("argv", "words"), [pytest.param(a, w, id=f"{kind}-{i}") for kind, cases in CASES.items() for i, (a, w) in enumerate(cases)]
)
def test_one_clear_line_and_exit_code_2(place, broken_runs, capfd, monkeypatch, argv, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fill = {name: str(path) for name, path in broken_runs.items()} | {"run": str(place.run)}
    argv = [fill_in(word, fill, place) for word in argv]
    needs_text = not any(w.startswith(("data=", "resume=")) for w in argv)
    small = [w for w in SMALL if not w.startswith("data=") and not any(a.startswith(w.partition("=")[0] + "=") for a in argv)]
    base = ["name=bad", *place.roots]
    if not any(w.startswith("resume=") for w in argv):
        quick = [w for w in QUICK if not any(a.startswith(w.partition("=")[0] + "=") for a in argv)]
        base += [*quick, *small, *(["data=text", f"data.path={place.text}"] if needs_text and "task=sft" not in argv else [])]
    if "task=sft" in argv and "data=chat" not in argv:
        base = [w for w in base if not w.startswith("data.")]
    code = train.main([*base, *argv])
    check_refusal(code, capfd.readouterr().err, words)
    assert newest_run(place.folder / "outputs" / "bad", unfinished=True) is None
    shutil.rmtree(place.folder / "outputs" / "bad", ignore_errors=True)


def fill_in(word: str, fill: dict[str, str], place: Place) -> str:
    if "{" not in word:
        return word
    head, _, rest = word.partition("{")
    name, _, tail = rest.partition("}")
    return head + fill.get(name, place[name]) + tail


GENERATE = [
    (["ckpt={nowhere}"], ["ckpt", "does not exist"]),
    (["ckpt={not_a_run}"], ["ckpt", "not a run"]),
    (["ckpt={run}", "prompts={prompts.jsonl}"], ["prompts.jsonl", "prompt", "question"]),
    (["ckpt={run}", "prompts={torn_prompts.jsonl}"], ["torn_prompts.jsonl", "line 2"]),
    (["ckpt={run}", "prompts={empty.txt}"], ["empty.txt"]),
    (["ckpt={run_torn}", "prompt=a"], ["run_torn"]),
    (["ckpt={run_swapped}", "prompt=a"], ["another architecture"]),
    (["ckpt={run}", "decode=gredy"], ["decode", "did you mean 'greedy'"]),
    (["ckpt={run}", "max_new_tokens=many"], ["max_new_tokens"]),
]


@pytest.mark.parametrize(("argv", "words"), [pytest.param(a, w, id=" ".join(a)) for a, w in GENERATE])
def test_generate_refuses_in_one_line(place, broken_runs, capfd, argv, words):
    fill = {name: str(path) for name, path in broken_runs.items()} | {"run": str(place.run)}
    code = generate.main([*place.roots, *(fill_in(word, fill, place) for word in argv)])
    check_refusal(code, capfd.readouterr().err, words)


def test_generate_without_any_run_says_to_train_first(tmp_path, capfd):
    code = generate.main([f"paths.root={tmp_path}", "prompt=a"])
    check_refusal(code, capfd.readouterr().err, ["no trained run", "python train.py"])


@pytest.mark.parametrize("full", [".ckpt", ".bin", "metrics.csv"])
def test_no_space_left_is_one_line_and_keeps_what_was_finished(place, capfd, monkeypatch, full, tmp_path):
    """A full disk at each place that writes: a checkpoint, the token file, the metrics."""
    real_replace, real_open = os.replace, open

    def full_replace(source, target, **kwargs):
        if str(target).endswith(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return real_replace(source, target, **kwargs)

    def full_open(file, mode="r", *args, **kwargs):
        if isinstance(file, (str, Path)) and str(file).endswith(full) and full == "metrics.csv" and mode[0] in "wa":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return real_open(file, mode, *args, **kwargs)

    monkeypatch.setattr(os, "replace", full_replace)
    monkeypatch.setattr("builtins.open", full_open)
    roots = [f"paths.root={tmp_path / 'outputs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    code = train.main([*roots, *SMALL, *QUICK, f"data.path={place.text}", "name=full", "checkpoint.every_steps=1"])
    check_refusal(code, capfd.readouterr().err, ["space"])
    assert not list(tmp_path.glob("**/*.tmp"))


def test_all_mistakes_of_a_line_are_reported_together(capfd):
    assert train.main(["model=sambaa", "optimizer.lrr=3", "trainer.max_steps=ten", "seed=abc"]) == 2
    err = capfd.readouterr().err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 4 and "Traceback" not in err


def test_traceback_on_request(capfd):
    assert train.main(["seed=abc", "traceback=true", "logger=none"]) == 2
    assert "Traceback" in capfd.readouterr().err


SUBPROCESS = [  # one of each script in the default tests: a process takes seconds, and one process has all cases above
    ("train.py", ["model=sambaa"], ["did you mean 'samba'"], ()),
    ("train.py", ["optimizer.lrr=1", "logger=none"], ["did you mean 'optimizer.lr'"], pytest.mark.slow),
    ("train.py", ["data=text"], ["data.path", "no value"], pytest.mark.slow),
    ("train.py", ["data=text", "data.path=nowhere.txt"], ["nowhere.txt"], pytest.mark.slow),
    ("train.py", ["trainer=gpu"], ["no CUDA"], pytest.mark.slow),
    ("generate.py", [], ["no trained run"], ()),
]


@pytest.mark.parametrize(
    ("script", "argv", "words"), [pytest.param(*case, id=f"{case[0]} {' '.join(case[1])}", marks=marks) for *case, marks in SUBPROCESS]
)
def test_real_process_refuses_in_one_line(tmp_path, script, argv, words):
    done = run(tmp_path, *argv, script=script)
    check_refusal(done.returncode, done.stderr, words)
    assert newest_run(tmp_path / "outputs") is None


@pytest.mark.parametrize(("number", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)])
def test_real_process_stopped_by_a_signal_says_how_to_resume(tmp_path, number, code):
    text = shakespeare_like(tmp_path / "text.txt")
    process = start(tmp_path, *SMALL, f"data.path={text}", "trainer.max_steps=100000", "trainer.log_every_n_steps=1", "logger=none")
    wait_for_step(process, tmp_path, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert f"resume={only_run(tmp_path)}" in out + err
    checkpoint = max((only_run(tmp_path) / "checkpoints").glob("step*.ckpt"))
    torch.load(checkpoint, weights_only=True)
