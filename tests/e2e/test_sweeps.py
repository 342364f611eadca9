"""Sweeps as a user runs them: real processes, real W&B files, real launchers, real kills."""

import json
import re
import signal
import time

import pytest

from framework.logging import read_rows
from framework.runs import read_state
from tests.e2e.commands import SMALL, history, run, shakespeare_like, start
from tests.framework import wandb_file

TINY = [*SMALL, "trainer.precision=32-true", "trainer.max_steps=5", "samples.max_new_tokens=4", "checkpoint.every_steps=2"]


def sweep(folder, *words, **options):
    """A sweep in folder/s; returns the finished process and the job folders in order."""
    text = folder / "train.txt"
    if not text.exists():
        shakespeare_like(text, 20)
    done = run(folder, *TINY, f"data.path={text}", f"hydra.sweep.dir={folder / 's'}", *words, "-m", **options)
    return done, jobs_of(folder)


def jobs_of(folder):
    return sorted((p for p in (folder / "s").glob("[0-9]*_*")), key=lambda p: int(p.name.partition("_")[0]))


def rows_of(done):
    """Words of the summary's lines, by job number."""
    lines = [line.split() for line in done.stdout.splitlines() if (re.match(r"\s*\d+  ", line) and "/s/" in line) or "not started" in line]
    return {int(line[0]): line for line in lines}


def test_wandb_run_is_not_shared_across_multirun_jobs_and_a_failed_one_is_finished_as_failed(tmp_path):
    """Jobs of one process: own ids, own files; the diverged one in the middle is recorded and the next goes on as if alone."""
    done, jobs = sweep(tmp_path, "optimizer.lr=1e-3,1e20", "seed=1,2", "logger.mode=offline", "tags=[mine]")
    assert done.returncode == 2, done.stderr[-2000:]
    assert [read_state(job)["status"] for job in jobs] == ["done", "done", "diverged", "diverged"]
    ids = [read_state(job)["wandb_id"] for job in jobs]
    assert len(set(ids)) == 4
    for job, code in zip(jobs, (0, 0, 1, 1)):
        (file,) = wandb_file.files(job)
        assert read_state(job)["wandb_id"] in file.name
        assert wandb_file.history(file) == read_rows(job)
        opened = next(r.run for r in wandb_file.records(file) if r.WhichOneof("record_type") == "run")
        assert opened.run_group == "s" and {"mine", "optimizer=muon"} <= set(opened.tags)
        assert [r.exit.exit_code for r in wandb_file.records(file) if r.WhichOneof("record_type") == "exit"] == [code]
    assert "not finite" in (jobs[2] / "error.txt").read_text() and not (jobs[0] / "error.txt").exists()
    assert {number: row[3] for number, row in rows_of(done).items()} == {0: "done", 1: "done", 2: "diverged", 3: "diverged"}
    assert f"python -m framework.report {tmp_path / 's'}" in done.stdout and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["jobs"][2]["status"] == "diverged"


@pytest.mark.slow
def test_eight_runs_leak_nothing_into_one_another(tmp_path):
    """model x optimizer x seed in one process; the last equals the same run alone, bit for bit, and costs little beyond its training."""
    begin = time.monotonic()
    done, jobs = sweep(tmp_path, "model=samba,phi4mini", "optimizer=adamw,muon", "seed=1,2", "logger.mode=offline")
    seconds = time.monotonic() - begin
    assert done.returncode == 0 and len(jobs) == 8, done.stderr[-2000:]
    assert len({read_state(job)["wandb_id"] for job in jobs}) == 8
    for job in jobs:
        (file,) = wandb_file.files(job)
        assert wandb_file.history(file) == read_rows(job)
    training = sum(json.loads((job / "metrics.json").read_text())["seconds"] for job in jobs)
    print(f"overhead per job {(seconds - training) / 8:.1f} s")
    assert (seconds - training) / 8 < 15  # 5 s on an idle machine
    alone = run(tmp_path, *TINY, f"data.path={tmp_path / 'train.txt'}", "model=phi4mini", "optimizer=muon", "seed=2", "logger=none")
    assert alone.returncode == 0
    (single,) = (p.parent for p in (tmp_path / "outputs").glob("**/run_state.json"))
    assert history(single) == history(jobs[7])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_give_the_same_runs_and_the_same_table(tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher" if launcher == "joblib" else "hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "basic").mkdir()
    _, expected = sweep(tmp_path / "basic", "seed=1,2", "logger=none")
    done, jobs = sweep(tmp_path, "seed=1,2", "optimizer.lr=3e-3,1e20", f"hydra/launcher={launcher}", "logger.mode=offline", threads=None)
    assert done.returncode == 2, done.stderr[-2000:]
    assert [read_state(job)["status"] for job in jobs] == ["done", "diverged", "done", "diverged"]
    assert [history(job) for job in jobs[::2]] == [history(job) for job in expected]
    assert len({read_state(job)["wandb_id"] for job in jobs}) == 4
    assert sorted(rows_of(done)) == [0, 1, 2, 3] and "2 jobs at a time, " in done.stdout


@pytest.mark.slow
def test_a_killed_sweep_of_twenty_jobs_is_finished_without_repeating_anything(tmp_path):
    """kill -9 after no and after six finished jobs, each time somewhere inside the next one; then resume=SWEEP_DIR."""
    kills = (0, 6)
    text, folder = shakespeare_like(tmp_path / "train.txt", 20), tmp_path / "s"
    words = [*TINY, "trainer.max_steps=30", "logger=none", f"data.path={text}"]
    command = [*words, "seed=range(1,21)", f"hydra.sweep.dir={folder}", "-m"]
    before: dict = {}
    for wanted in kills:
        process = start(tmp_path, *command)
        wait_for_jobs(process, tmp_path, wanted)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        finished = [job for job in jobs_of(tmp_path) if read_state(job).get("status") == "done"]
        assert wanted <= len(finished) < 20
        for job in before:
            assert touched(job) == before[job]
        before = {job: touched(job) for job in finished}
        command = [f"resume={folder}"]
    begun = [job for job in jobs_of(tmp_path) if job not in before and read_state(job)]
    done = run(tmp_path, f"resume={folder}", timeout=400)
    jobs = jobs_of(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(jobs) == 20 and all(read_state(job)["status"] == "done" for job in jobs)
    assert all(touched(job) == before[job] for job in before)
    assert done.stdout.count("is done already") == len(before)
    assert {number: row[2] for number, row in rows_of(done).items()} == dict.fromkeys(range(20), "done")
    for job in [*begun, jobs[19]]:
        seed = read_state(job)["seed"]
        alone = run(tmp_path, *words, f"seed={seed}", "name=alone", f"paths.root={tmp_path / f'alone{seed}'}")
        assert alone.returncode == 0
        (single,) = (p.parent for p in (tmp_path / f"alone{seed}").glob("**/run_state.json"))
        assert history(single) == history(job)
    again = run(tmp_path, f"resume={folder}")
    assert again.returncode == 0 and again.stdout.count("is done already") == 20


def wait_for_jobs(process, folder, number, timeout=240):
    """Return when so many jobs are done and the next one has done some steps."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        jobs = jobs_of(folder)
        done = [job for job in jobs if read_state(job).get("status") == "done"]
        if len(done) >= number and any(job not in done and len(read_rows(job)) > 7 for job in jobs):
            return
        time.sleep(0.005)
    raise AssertionError(f"{number} jobs were not done: {process.poll()}")


def touched(job):
    """When the files that a training writes were last written."""
    names = ("metrics.csv", "metrics.json", "run_state.json", "config.yaml")
    return [(job / name).stat().st_mtime_ns for name in names] + [p.stat().st_mtime_ns for p in sorted((job / "checkpoints").iterdir())]


@pytest.mark.slow
def test_a_killed_search_goes_on_with_what_it_knows(tmp_path):
    """Optuna: finished trials count, the trial that was cut short is resumed in its folder, the number of trials is the one asked for."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    text, folder = shakespeare_like(tmp_path / "train.txt", 20), tmp_path / "s"
    words = [*TINY, "trainer.max_steps=30", "logger=none", f"data.path={text}", f"hydra.sweep.dir={folder}"]
    process = start(tmp_path, *words, "sweep=optuna", "hydra.sweeper.n_trials=5")
    wait_for_jobs(process, tmp_path, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    before = {job: touched(job) for job in jobs_of(tmp_path) if read_state(job).get("status") == "done"}
    cut = [job for job in jobs_of(tmp_path) if job not in before]
    assert len(cut) == 1
    done = run(tmp_path, f"resume={folder}", timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    jobs = jobs_of(tmp_path)
    assert len(jobs) == 5 and all(read_state(job)["status"] == "done" for job in jobs)
    assert all(touched(job) == before[job] for job in before) and "going on from" in done.stdout
    assert len({(job / ".hydra" / "overrides.yaml").read_text() for job in jobs}) == 5
    best = min(json.loads((job / "metrics.json").read_text())["val/loss"] for job in jobs)
    assert f"best_value: {best}" in (folder / "optimization_results.yaml").read_text()


@pytest.mark.slow
def test_an_interrupt_ends_the_whole_sweep_and_says_how_to_finish_it(tmp_path):
    text, folder = shakespeare_like(tmp_path / "train.txt", 20), tmp_path / "s"
    process = start(
        tmp_path, *TINY, "trainer.max_steps=500", "logger=none", f"data.path={text}", f"hydra.sweep.dir={folder}", "seed=1,2,3", "-m"
    )
    wait_for_jobs(process, tmp_path, 0)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err[-2000:]
    assert f"finish it: python train.py resume={folder}" in out and out.count("not started") == 2
    assert read_state(jobs_of(tmp_path)[0])["status"] == "interrupted"
