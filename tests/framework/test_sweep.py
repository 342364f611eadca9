"""Sweeps without processes: what is planned, where jobs go, what the table says of folders, and the exit code."""

import json

import pytest
from omegaconf import OmegaConf

from components.contracts import UserError
from framework import resolvers
from framework.overrides import config_loader
from framework.resolvers import job_dir
from framework.runs import write_state
from framework.sweep import ERROR_FILE, Sweep, job_folder, might_sweep, read_jobs, rounded, table
from framework.sweep_plan import changed_keys, check_same, continued, fresh, grid, parse, plan_sweep, quote, variations

SMALL = ["model/size=test", "data=stdlib"]


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    resolvers.register()
    monkeypatch.chdir(tmp_path)


def job(folder, name, words, metrics=None, **state):
    path = folder / name
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in words))
    if state:
        write_state(path, **state)
    if metrics:
        (path / "metrics.json").write_text(json.dumps(metrics))
    return path


def sweep(folder, planned=None, **changes):
    folder.mkdir(exist_ok=True)
    made = Sweep(folder, [], ["seed=1,2"], ["seed"], planned, **changes)
    made.begin()
    return made


def words(values):
    with config_loader():
        return parse(values)


def test_jobs_are_hydras_own_in_its_order():
    jobs = grid(words(["model=samba,phi4mini", "optimizer=adamw,muon", "seed=range(1,3)", "name=x"]))
    assert len(jobs) == 8 and jobs[1] == ["model=samba", "optimizer=adamw", "seed=2", "name=x"]
    assert jobs[-1] == ["model=phi4mini", "optimizer=muon", "seed=2", "name=x"]


def test_every_value_is_checked_once_not_every_combination():
    parsed = words(["a=1,2,3", "hydra.x=1,2", "b=5", "c=x,y"])
    assert variations(parsed) == [["a=1", "b=5", "c=x"], ["a=2", "b=5", "c=x"], ["a=3", "b=5", "c=x"], ["a=1", "b=5", "c=y"]]
    assert changed_keys(parsed) == [None, "a", "a", "c"]
    assert variations(words(["optimizer.lr=tag(log,interval(1e-4,1e-1))"])) == [["optimizer.lr=0.0001"]]


def test_of_two_words_for_one_key_the_later_counts():
    assert grid(words(["seed=1,2", "seed=7"])) == [["seed=7"]]


def test_single_runs_cost_nothing(monkeypatch):
    assert might_sweep(["-m", "seed=1,2"]) and might_sweep(["sweep=lr"]) and might_sweep(["+experiment=x"])
    assert not might_sweep(["seed=1"]) and not might_sweep(["-m", "--cfg", "job"]) and not might_sweep(["-m", "--help"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not might_sweep(["-m", "seed=1,2"])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["optimizer=adamw,mun"], "optimizer: 'mun' is not an option; one of adamw, cosmos, muon, soap; did you mean 'muon'?"),
        (["sed=1,2"], "sed: unknown key; did you mean 'seed'?"),
        (["optimizer.lr=1e-3,abc", "seed=1,2"], "optimizer.lr: 'abc' is not a number"),
        (["on_error=no", "seed=1,2"], "on_error: 'no' is not one of skip, raise"),
        (["hydra/launcher=jobli"], "hydra/launcher: 'jobli' is not an option; one of "),
        (["resume=auto"], "resume: 'auto' is of one run"),
    ],
)
def test_opaque_config_errors(typed, line, tmp_path):
    """A typo in a sweep's words is one line, before any job starts and before anything is written."""
    with pytest.raises(UserError) as caught:
        plan_sweep("train", ["-m", *SMALL, *typed])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_plan_is_written_and_its_folder_continues_it_alone(tmp_path, capsys):
    plan = plan_sweep("train", ["-m", *SMALL, "seed=1,2", "optimizer.lr=0.1,0.2"])
    assert plan is not None and plan.folder.parent.name == "default" and plan.planned is not None and len(plan.planned) == 4
    assert plan.words[0] == "-m" and plan.words[-1] == f"hydra.sweep.dir={plan.folder}"
    record = json.loads((plan.folder / "sweep.json").read_text())
    assert record["id"] == plan.folder.name and record["swept"] == ["seed", "optimizer.lr"] and len(record["jobs"]) == 4
    assert record["command"] == "python train.py -m model/size=test data=stdlib seed=1,2 optimizer.lr=0.1,0.2"
    assert "sweep of 4 jobs" in capsys.readouterr().out
    again = plan_sweep("train", [f"resume={plan.folder}", "logger=none"])
    assert again is not None and again.folder == plan.folder and [set(w) - {"logger=none"} for w in again.planned] == [
        set(w) for w in plan.planned
    ]  # fmt: skip
    same = plan_sweep("train", ["-m", *SMALL, "seed=1,2", "optimizer.lr=0.1,0.2", f"hydra.sweep.dir={plan.folder}"])
    assert same is not None and same.created == plan.created
    with pytest.raises(UserError, match="holds another sweep"):
        plan_sweep("train", ["-m", *SMALL, "seed=1,3", f"hydra.sweep.dir={plan.folder}"])
    with pytest.raises(UserError, match=r"trainer.max_steps=3 would make the remaining jobs of .* differ"):
        continued([f"resume={plan.folder}", "trainer.max_steps=3"])


def test_a_changed_file_behind_the_words_is_noticed(tmp_path):
    before = sweep(tmp_path / "s", [["seed=1"], ["seed=2"]])
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    check_same(before, record)
    before.planned = [["seed=1"], ["seed=3"]]
    with pytest.raises(UserError, match="a file that its words name was changed"):
        check_same(before, record)


def test_prepared_sweeps_are_plans(tmp_path):
    plan = plan_sweep("train", [*SMALL, "sweep=lr", "seed=5"])
    assert plan is not None and plan.planned is not None and len(plan.planned) == 4
    assert all("seed=5" in job for job in plan.planned)
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = plan_sweep("train", [*SMALL, "sweep=optuna"])
    assert search is not None and search.planned is None


def test_job_folders_are_readable_and_differ(tmp_path):
    sweep(tmp_path / "s", [["seed=1"]])
    assert job_folder(str(tmp_path / "none"), 3, ["optimizer.lr=0.1"], "samba-s1") == "3_samba-s1"
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    (tmp_path / "s" / "sweep.json").write_text(json.dumps({**record, "swept": ["optimizer.lr", "model"]}))
    assert job_folder(str(tmp_path / "s"), 3, ["optimizer.lr=1e+20", "model=a"], "samba-s1") == "3_samba-s1-lr1e20"
    assert rounded("0.00204722352812965") == "0.002047" and rounded("a,b") == "a,b"


def test_a_samplers_begun_job_keeps_its_folder_and_new_ones_are_numbered_on(tmp_path):
    folder = tmp_path / "s"
    sweep(folder, None, first_job=2)
    job(folder, "0_a", ["lr=0.5"], status="done")
    job(folder, "1_a", ["lr=0.25"], status="running")
    assert job_folder(str(folder), 0, ["logger=none", "lr=0.25"], "a") == "1_a"
    assert job_folder(str(folder), 1, ["lr=0.125"], "a") == "3_a"


def test_a_begun_job_keeps_its_folder_whatever_it_would_be_named_now(tmp_path):
    """`ckpt=last` is another run after a while."""
    (tmp_path / "s/0_old/.hydra").mkdir(parents=True)
    (tmp_path / "s/0_old/.hydra/overrides.yaml").write_text("- ckpt=last\n- seed=1\n- logger=csv\n")
    assert job_folder(str(tmp_path / "s"), 0, ["ckpt=last", "seed=1", "logger=none"], "new") == "0_old"  # which may change
    for other in (["ckpt=last", "seed=2"], ["ckpt=last"], ["ckpt=last", "seed=1", "optimizer=muon"]):
        assert job_folder(str(tmp_path / "s"), 0, other, "new") == "0_new"


def test_a_jobs_folder_is_named_after_the_model_of_its_ckpt(tmp_path):
    job(tmp_path, "base", [], status="done", choices={"model": "phi4mini", "model/size": "test"})
    choices = {"model": "samba", "model/size": "tiny", "adapter": "lora"}
    for ckpt, name in ((str(tmp_path / "base"), "phi4mini-test-lora-s1"), ("???", "samba-tiny-lora-s1"), (None, "samba-tiny-lora-s1")):
        root = OmegaConf.create({"ckpt": ckpt, "paths": {"root": str(tmp_path)}})
        assert job_dir(str(tmp_path / "s"), 4, [], choices, 1, _root_=root) == f"4_{name}"


def test_the_table_reads_the_folders_alone(tmp_path, capsys):
    folder = tmp_path / "s"
    made = sweep(folder, [[f"seed={n}", "name=x"] for n in range(5)])
    numbers = {"val/loss": 1.25, "val/bits_per_byte": 2.5, "seconds": 3.04}
    job(folder, "0_a", ["seed=0", "name=x"], numbers, status="done")
    job(folder, "1_a", ["seed=1", "name=x"], status="failed", exit_code=2, error="data.path: no such file")
    job(folder, "2_a", ["seed=2", "name=x"], status="running")  # nobody holds its lock
    job(folder, "3_a", ["seed=3", "name=x"], status="interrupted")
    jobs = read_jobs(folder)
    assert [j.status for j in jobs] == ["done", "failed", "killed", "interrupted", "not started"]
    lines = [line.split() for line in table(jobs)]
    assert lines[1] == ["0", "seed=0", "done", "1.2500", "2.5000", "3.0", str(folder / "0_a")]
    assert lines[5] == ["4", "seed=4", "not", "started", "-", "-", "-", "-"]
    assert made.finish(0) == 1
    out, err = capsys.readouterr()
    assert f"python train.py resume={folder}" in out and f"python -m framework.report {folder}" in out
    assert f"job 1: failed: data.path: no such file ({folder / '1_a'}/{ERROR_FILE})" in err
    assert [j["status"] for j in json.loads((folder / "sweep.json").read_text())["jobs"]][:2] == ["done", "failed"]


@pytest.mark.parametrize(
    ("states", "code", "expected"),
    [
        ([("done", 0), ("done", 0)], 0, 0),
        ([("done", 0), ("failed", 2)], 2, 2),  # the user can mend all of them
        ([("failed", 1), ("failed", 2)], 2, 1),  # a defect of ours among them
        ([("diverged", 2)], 2, 2),
        ([("done", 0), ("interrupted", 0)], 130, 130),
        ([("done", 0)], 1, 1),  # the sweeper itself failed
    ],
)
def test_exit_codes(tmp_path, states, code, expected):
    made = sweep(tmp_path / "s", [])
    for n, (status, own) in enumerate(states):
        job(tmp_path / "s", f"{n}_a", [f"seed={n}"], {"val/loss": 1.0}, status=status, exit_code=own)
    assert made.finish(code) == expected


def test_two_sweeps_of_one_second_have_two_folders(tmp_path):
    assert fresh(tmp_path / "x") == tmp_path / "x"
    (tmp_path / "x").mkdir()
    assert fresh(tmp_path / "x") == tmp_path / "x-2"


def test_folders_with_odd_names_reach_hydra():
    for name in ("a/b-c_1.5", "with space", "it's", "a=b,c"):
        assert words([f"hydra.sweep.dir={quote(name)}"])[0].value() == name or name == "a/b-c_1.5"


@pytest.mark.parametrize(("metric", "way"), [("val/loss", "minimize"), ("eval/accuracy", "maximize"), ("val/bits_per_byte", "minimize")])
def test_a_search_knows_which_way_is_better(metric, way):
    assert resolvers.direction(metric) == way
