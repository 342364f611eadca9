"""Verdicts worked out by hand, on run folders as a sweep leaves them; the commands of the first claim, on real runs (slow)."""

import json
import re

import pytest
import yaml
from omegaconf import OmegaConf

from components.contracts import UserError
from framework import claims
from framework.arms import claim_hash, declared, first_stage, problems, read_claim, read_jobs, run_of, tuned
from framework.claims import BEGIN, END, INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, departures, judge, main, write_results
from framework.statistics import welch_interval

CLAIM = {
    "statement": "new beats old", "metric": "val/bits_per_byte", "arms": {"new": {"optimizer": "new"}, "old": {"optimizer": "old"}},
    "test": "paired_t", "threshold": 0.2, "seeds": [1, 2, 3], "budget_minutes": 10,
}  # fmt: skip


def write_job(folder, number, arm, seed, value, claim=CLAIM, status="done", words=(), rows=None, experiment=None, **config):
    """One job of a sweep, as training and Hydra leave it."""
    path = folder / f"{number}_{arm}-s{seed}"
    (path / ".hydra").mkdir(parents=True)
    task = [f"optimizer={arm}", f"seed={seed}", *words]
    hydra = {"runtime": {"choices": {"optimizer": arm, "experiment": experiment}}, "overrides": {"task": task}}
    (path / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "optimizer": {"lr": 0.1}, "claim": claim, **config}, sort_keys=False))
    (path / "run_state.json").write_text(json.dumps({"status": status, "step": 7}))
    if status == "done":
        last = (rows or [{"tokens": 100.0, "seconds": 6.0}])[-1]
        metrics = {"val/bits_per_byte": value, "tokens": last["tokens"], "seconds": last["seconds"], "perf/tokens_per_second": 10.0}
        (path / "metrics.json").write_text(json.dumps(metrics))
    for step, row in enumerate(rows or [], 1):
        with open(path / "metrics.csv", "a") as file:
            print(*(["step", *row] if step == 1 else []), sep=",", end="\n" if step == 1 else "", file=file)
            print(step, *row.values(), sep=",", file=file)
    return path


def write_sweep(folder, new, old, **options):
    """Two arms over seeds 1, 2, ..; None leaves a job out."""
    for arm, values in (("new", new), ("old", old)):
        for seed, value in enumerate(values, 1):
            if value is not None:
                write_job(folder, seed + (10 if arm == "old" else 0), arm, seed, value, **options)
    return folder


# Gains 0.3, 0.4, 0.5: mean 0.4, s = 0.1, t(0.975, 2) = 4.302653, half = 4.302653 * 0.1 / sqrt(3) = 0.248414.
NEW, OLD = [1.7, 1.6, 1.5], [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.15, SUPPORTED), (0.151, SUPPORTED), (0.152, INCONCLUSIVE), (0.648, INCONCLUSIVE), (0.649, NOT_SUPPORTED), (0.9, NOT_SUPPORTED)],
)
def test_verdict_is_where_the_interval_lies(tmp_path, threshold, expected):
    verdict = judge(write_sweep(tmp_path, NEW, OLD, claim={**CLAIM, "threshold": threshold}))
    (compared,) = verdict["comparisons"]
    assert verdict["verdict"] == expected
    assert compared["gain"] == pytest.approx(0.4)
    assert (compared["low"], compared["high"]) == (pytest.approx(0.151586, abs=1e-6), pytest.approx(0.648414, abs=1e-6))
    assert compared["n"] == 3 and compared["values"]["new"] == {"1": 1.7, "2": 1.6, "3": 1.5}
    assert json.loads((tmp_path / "verdict.json").read_text()) == verdict


def test_higher_is_better_turns_the_sign(tmp_path):
    claim = {**CLAIM, "better": "higher", "threshold": 0.1}
    assert judge(write_sweep(tmp_path / "a", OLD, NEW, claim=claim))["verdict"] == SUPPORTED
    assert judge(write_sweep(tmp_path / "b", NEW, OLD, claim=claim))["verdict"] == NOT_SUPPORTED


def test_rivals_are_compared_and_other_arms_only_shown(tmp_path):
    arms = {**CLAIM["arms"], "best": {"optimizer": "best"}}
    claim = {**CLAIM, "arms": arms, "threshold": 0.1, "show": ["val/bits_per_byte"]}
    for name, rivals, expected in (("some", ["old"], SUPPORTED), ("all", [], NOT_SUPPORTED)):
        folder = write_sweep(tmp_path / name, NEW, OLD, claim={**claim, "rivals": rivals})
        for seed in (1, 2, 3):
            write_job(folder, 20 + seed, "best", seed, 0.5, claim={**claim, "rivals": rivals})
        verdict = judge(folder)
        assert verdict["verdict"] == expected and verdict["figures"]["best"]["val/bits_per_byte"] == [0.5] * 3
    (line,) = problems({**claim, "rivals": ["bets"]})
    assert line.startswith("claim.rivals: 'bets' is not one of old, best") and "best" in line.rpartition(";")[2]


def test_several_arms_have_rivals_of_their_own(tmp_path):
    arms = {**CLAIM["arms"], "best": {"optimizer": "best"}}
    for name, rivals, expected in (
        ("a", {"new": ["old"], "best": ["old"]}, SUPPORTED),
        ("b", {"old": ["best"], "best": ["new"]}, NOT_SUPPORTED),
    ):
        claim = {**CLAIM, "arms": arms, "threshold": 0.1, "rivals": rivals}
        folder = write_sweep(tmp_path / name, NEW, OLD, claim=claim)
        for seed in (1, 2, 3):
            write_job(folder, 20 + seed, "best", seed, 0.5, claim=claim)
        verdict = judge(folder)
        assert verdict["verdict"] == expected
        assert [c["arms"] for c in verdict["comparisons"]] == [[arm, other] for arm, others in rivals.items() for other in others]
    lines = list(problems({**claim, "rivals": {"nwe": ["old"], "old": ["old"]}}))
    assert [line.partition(";")[0] for line in lines] == [
        "claim.rivals: 'nwe' is not one of new, old, best",
        "claim.rivals: 'old' is not one of new, best",
    ]


def test_one_seed_says_nothing(tmp_path):
    verdict = judge(write_sweep(tmp_path, [1.0], [9.0], claim={**CLAIM, "seeds": [1]}))
    assert verdict["verdict"] == INCONCLUSIVE
    assert verdict["comparisons"][0]["low"] is None


def test_missing_seed_is_inconclusive_and_named(tmp_path):
    verdict = judge(write_sweep(tmp_path, [1.7, None, 1.5], OLD))
    assert verdict["verdict"] == INCONCLUSIVE
    assert verdict["why"] == ["no finished run of new seed 2"]
    assert verdict["comparisons"][0]["n"] == 2


def test_failed_job_is_counted_and_inconclusive(tmp_path):
    write_sweep(tmp_path, [1.7, None, 1.5], OLD)
    write_job(tmp_path, 2, "new", 2, None, status="failed")
    verdict = judge(tmp_path)
    assert verdict["verdict"] == INCONCLUSIVE
    assert verdict["jobs"] == {"planned": 6, "done": 5, "failed": 1, "unfinished": 0, "other": 0}
    assert verdict["why"] == ["2_new-s2: failed at step 7", "no finished run of new seed 2"]


def test_job_that_failed_before_it_was_a_run_is_counted(tmp_path):
    write_sweep(tmp_path, [1.7, 1.6, None], OLD)
    path = write_job(tmp_path, 3, "new", 3, None, status="failed")
    (path / "config.yaml").unlink()
    (path / "run_state.json").unlink()
    assert judge(tmp_path)["jobs"]["failed"] == 1


def test_second_run_of_a_cell_is_inconclusive(tmp_path):
    """Running until one likes the number is not allowed."""
    write_sweep(tmp_path, NEW, OLD)
    write_job(tmp_path, 20, "new", 1, 0.1)
    verdict = judge(tmp_path)
    assert verdict["verdict"] == INCONCLUSIVE and verdict["why"] == ["20_new-s1: a second run of new with seed 1"]
    assert verdict["comparisons"][0]["values"]["new"]["1"] == 1.7


def test_other_seeds_are_left_out(tmp_path):
    write_sweep(tmp_path, [*NEW, 0.0], [*OLD, 9.0], claim={**CLAIM, "threshold": 0.15})
    verdict = judge(tmp_path)
    assert verdict["verdict"] == SUPPORTED and verdict["jobs"]["other"] == 2


def test_setup_other_than_the_experiment_is_inconclusive(tmp_path):
    """A statement about size tiny is not shown by runs at size test."""
    words = ("model/size=test", "logger=none", "hydra.sweep.dir=x", "+trainer.max_steps=3")
    verdict = judge(write_sweep(tmp_path, NEW, OLD, claim={**CLAIM, "threshold": 0.15}, words=words))
    assert verdict["verdict"] == INCONCLUSIVE
    assert verdict["why"] == ["the runs depart from the experiment by model/size=test, +trainer.max_steps=3"]


def test_what_the_experiment_asks_for_is_no_departure(tmp_path):
    """It leaves the folder of the user's texts open; a key that it has not is foreign, and so is the folder where it is not asked for."""
    words = ("texts=anywhere", "data.seq_len=8")
    for number, (experiment, foreign) in enumerate([("mtl_lora_realtext", words[1:]), ("muon_vs_adamw", words), (None, words)]):
        folder = tmp_path / str(number)
        write_job(folder, 0, "new", 1, 0.1, words=words, experiment=experiment)
        assert departures(read_claim(CLAIM), read_jobs(folder)) == list(foreign)


def test_diverged_value_is_inconclusive(tmp_path):
    verdict = judge(write_sweep(tmp_path, [1.7, float("nan"), 1.5], OLD))
    assert verdict["verdict"] == INCONCLUSIVE and "seed 2 is not there" in verdict["why"][0]


def test_equal_tokens_and_equal_seconds(tmp_path):
    """The slower arm is read where the faster one ended, between its two validations: 4 of 6 s lie midway between 2 s and 6 s."""
    fast = [{"tokens": 100.0, "seconds": 4.0, "val/bits_per_byte": 2.0}]
    slow = [{"tokens": 50.0, "seconds": 2.0, "val/bits_per_byte": 3.0}, {"tokens": 100.0, "seconds": 6.0, "val/bits_per_byte": 1.0}]
    claim = {**CLAIM, "threshold": {"tokens": 0.5, "seconds": 0.5}}
    for seed in (1, 2, 3):
        write_job(tmp_path, seed, "new", seed, 1.0, claim=claim, rows=slow)
        write_job(tmp_path, seed + 10, "old", seed, 2.0, claim=claim, rows=fast)
    verdict = judge(tmp_path)
    tokens, seconds = verdict["comparisons"]
    assert tokens["gains"] == {"1": 1.0, "2": 1.0, "3": 1.0} and tokens["verdict"] == SUPPORTED
    assert seconds["values"]["new"] == {"1": 2.0, "2": 2.0, "3": 2.0} and seconds["amounts"]["1"] == 4.0
    assert seconds["gain"] == 0.0 and seconds["verdict"] == NOT_SUPPORTED
    assert verdict["verdict"] == NOT_SUPPORTED  # one refuted comparison refutes the claim


def test_training_seconds_leave_validation_out(tmp_path):
    """10 tokens/s over 40 tokens, then 20 tokens/s over 60: 4 s, then 7 s, whatever the clock on the wall says."""
    rows = [
        {"tokens": 40.0, "seconds": 9.0, "perf/tokens_per_second": 10.0, "val/bits_per_byte": 3.0},
        {"tokens": 100.0, "seconds": 50.0, "perf/tokens_per_second": 20.0, "val/bits_per_byte": 1.0},
    ]
    from framework.arms import read_job

    job = read_job(write_job(tmp_path, 1, "new", 1, 1.0, rows=rows))
    assert [row["training_seconds"] for row in job.rows()] == [4.0, 7.0]
    assert job.value_at("val/bits_per_byte", "training_seconds", 5.5) == pytest.approx(2.0)
    assert job.value_at("val/bits_per_byte", "training_seconds", 1.0) is None  # before the first validation


def test_welch_test_is_used_when_named(tmp_path):
    verdict = judge(write_sweep(tmp_path, [1.0, 2.0, 3.0], [4.0, 5.0, 9.0], claim={**CLAIM, "test": "welch_t"}))
    (compared,) = verdict["comparisons"]
    assert (compared["gain"], compared["low"], compared["high"]) == pytest.approx(welch_interval([4, 5, 9], [1, 2, 3]))


def test_three_arms_need_both_comparisons(tmp_path):
    claim = {**CLAIM, "arms": {**CLAIM["arms"], "third": {"optimizer": "third"}}, "threshold": 0.1}
    write_sweep(tmp_path, NEW, OLD, claim=claim)
    for seed, value in enumerate(NEW, 1):
        write_job(tmp_path, 20 + seed, "third", seed, value + 0.0, claim=claim)
    verdict = judge(tmp_path)
    assert [c["verdict"] for c in verdict["comparisons"]] == [SUPPORTED, NOT_SUPPORTED] and verdict["verdict"] == NOT_SUPPORTED


# ------------------------------------------------------------------------------------------------------------ the claim


def test_hash_is_of_the_content_alone():
    shuffled = {key: CLAIM[key] for key in reversed(CLAIM)}
    assert claim_hash(shuffled) == claim_hash(CLAIM) == claim_hash({**CLAIM, "budget_minutes": 10.0})
    assert claim_hash({**CLAIM, "threshold": 0.19}) != claim_hash(CLAIM)
    swapped = {**CLAIM, "arms": {key: CLAIM["arms"][key] for key in ("old", "new")}}
    assert claim_hash(swapped) != claim_hash(CLAIM)  # another claim: the first arm is the better one
    assert re.fullmatch("[0-9a-f]{16}", claim_hash(CLAIM))


def test_yaml_changed_after_running_is_said(tmp_path):
    stored = {**declared("muon_vs_adamw"), "tunes": []}  # unlike the file
    same, other = tmp_path / "same", tmp_path / "other"
    for folder, claim in ((same, declared("muon_vs_adamw")), (other, stored)):
        for number, (arm, seed) in enumerate((a, s) for a in ("muon", "adamw") for s in (1, 2, 3)):
            write_job(folder, number, arm, seed, 1.0, claim=claim, experiment="muon_vs_adamw", stage_one=str(tmp_path / "none"))
    assert judge(same)["claim_changed"] is False
    verdict = judge(other)
    assert verdict["claim_changed"] is True and verdict["claim"] == stored
    assert any("was changed after running" in note for note in verdict["notes"])


def test_runs_of_different_claims_are_inconclusive(tmp_path):
    write_sweep(tmp_path, [1.7, 1.6, None], OLD, claim={**CLAIM, "threshold": 0.15})
    write_job(tmp_path, 3, "new", 3, 1.5, claim={**CLAIM, "threshold": 0.05})
    verdict = judge(tmp_path)
    assert verdict["verdict"] == INCONCLUSIVE and "the runs carry 2 different claims" in verdict["why"]


def test_over_budget_is_noted(tmp_path):
    verdict = judge(write_sweep(tmp_path, NEW, OLD, claim={**CLAIM, "budget_minutes": 0.5}))  # six runs of 6 s
    assert verdict["minutes"] == 0.6 and verdict["notes"] == ["took 0.6 minutes of training; the budget was 0.5"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"metric": None}, "claim.metric: no value given"),
        ({"tests": 1}, "claim.tests: unknown key; .*did you mean 'test'"),
        ({"test": "t_test"}, "claim.test: 't_test' is not one of paired_t, welch_t"),
        ({"threshold": {"token": 0.1}}, "claim.threshold.token: not an axis; one of end, tokens, .*did you mean 'tokens'"),
        ({"threshold": "much"}, "claim.threshold.end: 'much' is not a number"),
        ({"arms": {"new": {"optimizer": "new"}}}, "claim.arms: .*at least two"),
        ({"seeds": [1, 1]}, "claim.seeds: .*different seeds"),
        ({"level": 95}, "claim.level: 95 is out of range"),
    ],
)
def test_malformed_claim_is_refused_in_one_line(change, line):
    (found,) = problems({**CLAIM, **change})
    assert re.match(line, found), found
    with pytest.raises(UserError, match=line):
        read_claim({**CLAIM, **change})


# --------------------------------------------------------------------------------------------------------- first stage

TUNED = {**CLAIM, "tunes": ["optimizer.lr"], "threshold": 0.15}


def write_first_stage(folder, claim=TUNED):
    """new is best at 0.2, inside its sweep; old at 0.4, the edge, where its run at 0.8 failed."""
    for number, (arm, lr, value) in enumerate(
        [("new", 0.1, 3.0), ("new", 0.2, 1.0), ("new", 0.4, 2.0), ("old", 0.1, 3.0), ("old", 0.2, 2.0), ("old", 0.4, 1.5)]
    ):
        write_job(folder, number, arm, 1, value, claim=claim, optimizer={"lr": lr}, words=[f"optimizer.lr={lr}"])
    return folder


def test_first_stage_chooses_the_best_of_each_arm(tmp_path):
    found = first_stage(write_first_stage(tmp_path), read_claim(TUNED))
    assert {arm: row["best"] for arm, row in found.items()} == {"new": {"optimizer.lr": 0.2}, "old": {"optimizer.lr": 0.4}}
    assert found["new"]["at_edge"] == [] and found["old"]["at_edge"] == ["optimizer.lr"]
    assert judge(tmp_path) is None  # it has nothing to judge


def test_failed_point_bounds_the_sweep(tmp_path):
    write_first_stage(tmp_path)
    write_job(tmp_path, 9, "old", 1, None, status="failed", claim=TUNED, optimizer={"lr": 0.8})
    found = first_stage(tmp_path, read_claim(TUNED))["old"]
    assert found["best"] == {"optimizer.lr": 0.4} and found["at_edge"] == [] and found["points"][-1]["value"] is None


def test_verdict_reports_the_first_stage(tmp_path):
    first, second = write_first_stage(tmp_path / "one"), tmp_path / "two"
    for number, (arm, seed, value) in enumerate((a, s, v) for a, vs in (("new", NEW), ("old", OLD)) for s, v in enumerate(vs, 1)):
        lr = {"new": 0.2, "old": 0.4}[arm]
        write_job(second, number, arm, seed, value, claim=TUNED, stage_one=str(first), optimizer={"lr": lr})
    verdict = judge(second)
    assert verdict["verdict"] == SUPPORTED
    assert verdict["stage_one"]["arms"]["new"]["best"] == {"optimizer.lr": 0.2}
    assert verdict["notes"] == ["old: the best optimizer.lr of the first stage, 0.4, is the last one tried; a better one may lie beyond"]
    assert verdict["minutes"] == 1.2  # both stages


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda one: one.rename(one.with_name("moved")), "the first stage cannot be read"),
        (lambda one: write_job(one, 9, "old", 1, 9.0, claim=TUNED, optimizer={"lr": 0.8}), "unequal budgets .*: points new 3, old 4"),
        (lambda one: write_job(one, 9, "new", 1, 0.5, claim=TUNED, optimizer={"lr": 0.8}), "new seed 1 ran with .*, not with the best"),
        (lambda one: write_job(one, 9, "new", 2, 9.0, claim=CLAIM, optimizer={"lr": 0.1}), "ran with another version of the claim"),
        (lambda one: write_job(one, 9, "new", 2, 9.0, claim=TUNED, optimizer={"lr": 0.1}, words=["data=text"]), "departs .* by data=text"),
    ],
)  # fmt: skip
def test_unfair_first_stage_is_inconclusive(tmp_path, change, why):
    first, second = write_first_stage(tmp_path / "one"), tmp_path / "two"
    for number, (arm, seed, value) in enumerate((a, s, v) for a, vs in (("new", NEW), ("old", OLD)) for s, v in enumerate(vs, 1)):
        lr = {"new": 0.2, "old": 0.4}[arm]
        write_job(second, number, arm, seed, value, claim=TUNED, stage_one=str(first), optimizer={"lr": lr})
    change(first)
    verdict = judge(second)
    assert verdict["verdict"] == INCONCLUSIVE and any(re.search(why, line) for line in verdict["why"]), verdict["why"]


def test_run_of_finds_the_run_of_this_seed(tmp_path):
    for number, (kind, seed, status) in enumerate([("new", 1, "done"), ("new", 2, "done"), ("old", 1, "done"), ("old", 2, "failed")]):
        folder = tmp_path / f"{number}_job"
        folder.mkdir()
        OmegaConf.save(OmegaConf.create({"kind": kind, "seed": seed}), folder / "config.yaml")
        (folder / "run_state.json").write_text(json.dumps({"status": status, "choices": {"kind": kind}}))
        (folder / "metrics.json").write_text('{"loss": 1.0}')
    config = OmegaConf.create({"seed": 2})
    assert run_of(str(tmp_path), ["kind=new"], config) == str(tmp_path / "1_job")
    assert run_of(str(tmp_path), ["kind=new", "seed=1"], config) == str(tmp_path / "0_job")  # one run that all seeds go on from
    with pytest.raises(UserError, match="holds 0 finished runs with kind=old, seed=2; exactly one is needed"):
        run_of(str(tmp_path), ["kind=old"], config)
    with pytest.raises(UserError, match="holds 2 finished runs with seed=1"):
        run_of(str(tmp_path), [], OmegaConf.create({"seed": 1}))


def test_tuned_resolver_gives_this_arm_its_value(tmp_path):
    folder = str(write_first_stage(tmp_path / "one"))
    config = OmegaConf.create({"claim": {**TUNED, "arms": {"new": {"kind": "new"}, "old": {"kind": "old"}}}, "stage_one": folder})
    for file in (tmp_path / "one").glob("*/config.yaml"):
        stored = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump({**stored, "kind": file.parent.name.split("_")[1].split("-")[0]}))
    assert [tuned("optimizer.lr", OmegaConf.merge(config, {"kind": kind})) for kind in ("new", "old")] == [0.2, 0.4]
    with pytest.raises(UserError, match="this job is of none of new, old"):
        tuned("optimizer.lr", OmegaConf.merge(config, {"kind": "third"}))
    with pytest.raises(UserError, match=r"does not name optimizer\.beta"):
        tuned("optimizer.beta", config)
    with pytest.raises(UserError, match="stage_one: no value given"):
        tuned("optimizer.lr", OmegaConf.merge(config, {"stage_one": None}))


# -------------------------------------------------------------------------------------------------------- the commands


def test_command_says_the_verdict_and_errors_in_one_line(tmp_path, capsys):
    write_sweep(tmp_path / "a", NEW, OLD, claim={**CLAIM, "threshold": 0.15})
    assert main([str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("SUPPORTED: new beats old\n")
    assert "new 1.6000, old 2.0000; gain +0.4000 [+0.1516, +0.6484] (95%, n=3), at least 0.15 claimed: SUPPORTED" in out
    write_sweep(tmp_path / "b", NEW, OLD, claim=None)
    (tmp_path / "c").mkdir()
    for folder, words in (("b", "carry no claim"), ("c", "holds no runs"), ("d", "is not a directory")):
        assert main([str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_results_page_keeps_what_is_written_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "DOCS", tmp_path / "docs")
    (tmp_path / "docs" / "verdicts").mkdir(parents=True)
    page = tmp_path / "docs" / "results.md"
    page.write_text(f"# By hand\n\n{BEGIN}\nold text\n{END}\n\nMore by hand.\n")
    verdict = judge(write_sweep(tmp_path / "sweep", NEW, OLD))
    (tmp_path / "docs" / "verdicts" / "x.json").write_text(json.dumps({**verdict, "experiment": "x"}))
    write_results(tmp_path / "docs")
    text = page.read_text()
    assert text.startswith("# By hand\n\n") and text.endswith(f"{END}\n\nMore by hand.\n") and "old text" not in text
    assert "### x: INCONCLUSIVE" in text and "| at the end of the runs | new | 2 | 1.6000 |" in text
    write_results(tmp_path / "docs")
    assert page.read_text() == text  # the same again
    page.write_text("no markers")
    with pytest.raises(UserError, match="lacks the lines"):
        write_results(tmp_path / "docs")


# ---------------------------------------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_both_stages_for_real(tmp_path):
    """The first claim's two commands at size test: its folders are read, its best rates are used, and the setup is not taken for tiny."""
    from tests.e2e.commands import SMALL, run, shakespeare_like

    words = [*SMALL, f"data.path={shakespeare_like(tmp_path / 'text.txt')}", "trainer.max_steps=20", "logger=none"]
    first, second = tmp_path / "multirun" / "muon_vs_adamw_lr", tmp_path / "multirun" / "muon_vs_adamw"
    done = run(tmp_path, "experiment=muon_vs_adamw", *words)
    assert done.returncode != 0 and "stage_one" in done.stderr  # not without a first stage
    done = run(tmp_path, "experiment=muon_vs_adamw_lr", *words)
    assert done.returncode == 0, done.stderr
    (folder,) = first.iterdir()
    assert judge(folder) is None
    best = {arm: row["best"]["optimizer.lr"] for arm, row in first_stage(folder, read_claim(declared("muon_vs_adamw"))).items()}
    done = run(tmp_path, "experiment=muon_vs_adamw", f"stage_one={folder}", *words, "validate.every_steps=5")
    assert done.returncode == 0, done.stderr
    folder = max(second.iterdir(), key=lambda path: len(list(path.glob("*/metrics.json"))))
    for config in folder.glob("*/config.yaml"):
        job = yaml.safe_load(config.read_text())
        arm = "muon" if "muon" in job["optimizer"]["_target_"] else "adamw"
        assert job["optimizer"]["lr"] == job["optimizer"]["overrides"][".*"]["lr"] == best[arm]
        assert claim_hash(job["claim"]) == claim_hash(declared("muon_vs_adamw"))
    verdict = judge(folder)
    assert verdict["jobs"]["done"] == 6 and [c["n"] for c in verdict["comparisons"]] == [3, 3]
    assert verdict["verdict"] == INCONCLUSIVE and "model/size=test" in verdict["why"][0] and not verdict["claim_changed"]
