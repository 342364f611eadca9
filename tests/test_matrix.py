"""Interchange: every model x adapter x optimizer x rope cell trains, or is refused for a reason on record; every other option runs."""

from __future__ import annotations

import csv
import itertools
import shutil

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import generate
import train
from framework import cells, matrix, overrides
from framework.build import compose
from framework.cells import (
    APART,
    CROSS,
    RULES,
    Outcome,
    Rule,
    cross_cells,
    label,
    legal_cells,
    mark_twins,
    pair_cells,
    read_rules,
    single_cells,
    verdict,
)
from framework.trial import Trial, moved_wrongly, resumed_wrongly

LISTED = read_rules()[0]
PAIRS = pair_cells()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return matrix.Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def outcome_of(bench):
    """A cross cell's outcome, tried when it is first asked for."""
    known = {}

    def outcome(cell):
        if label(cell) not in known:
            known[label(cell)] = matrix.run_cell(bench, cell)
        return known[label(cell)]

    return outcome


def several_processes(cell):
    """Does the trainer start further processes here? Such a run is a command of its own, and takes too long for the default tests."""
    if "trainer" not in cell:
        return False
    option = yaml.safe_load((overrides.CONF / "trainer" / f"{cell['trainer']}.yaml").read_text())
    return option.get("devices", 1) != 1 and (option.get("accelerator") == "cpu" or torch.cuda.is_available())


def ids(found):
    """Parameters of a test. All of the standard library as data takes longer than the rest; the end-to-end tests train on it as well."""
    slow = {"data=stdlib": pytest.mark.slow}
    return [pytest.param(cell, id=label(cell) or "defaults", marks=slow.get(label(cell), ())) for cell in found]


def right(outcome, rules):
    wrong = verdict(outcome, rules)
    if wrong and outcome.error is not None:
        raise AssertionError(wrong) from outcome.error
    assert not wrong, wrong


def test_every_two_options_meet():
    met = {pair for cell in PAIRS for pair in itertools.combinations(cell.items(), 2)}
    wanted = {pair for cell in cross_cells() for pair in itertools.combinations(cell.items(), 2)}
    assert met == wanted and len(PAIRS) < len(cross_cells()) / 4


@pytest.mark.parametrize("cell", [pytest.param(c, id=label(c), marks=() if c in PAIRS else pytest.mark.slow) for c in cross_cells()])
def test_cell(bench, outcome_of, cell):
    """Those in which every two options meet; all others among the slow tests."""
    right(outcome_of(cell), bench.rules)


@pytest.mark.slow
def test_no_option_is_without_effect(bench, outcome_of):
    found = [outcome_of(cell) for cell in cross_cells()]
    mark_twins(found, bench.twins)
    assert not [(label(o.cell), o.problems) for o in found if o.problems]


@pytest.mark.parametrize("rule", [pytest.param(rule, id=str(rule.cell)) for rule in LISTED if rule.holds_here])
def test_listed_cells_are_refused_with_their_message(bench, rule):
    for cell in rule.cells():
        outcome = matrix.refusal(bench, cell)
        assert outcome.status == "refused" and rule.message in outcome.message, (cell, outcome)


def single(bench, cell):
    """The cell through `python train.py` in this process."""
    right(matrix.run_single(bench, cell, train.main), bench.rules)


@pytest.mark.parametrize("cell", ids([{}, *cells.covering_cells()]))
def test_every_option_of_the_cross_through_the_command(bench, cell):
    single(bench, cell)


@pytest.mark.parametrize("cell", ids([c for c in [*single_cells("train"), *legal_cells(LISTED)] if not several_processes(c)]))
def test_option_of_another_group_through_the_command(bench, cell):
    single(bench, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ids([c for c in single_cells("train") if several_processes(c)]))
def test_option_of_several_processes(bench, cell):
    right(matrix.run_single(bench, cell, matrix.train_here), bench.rules)


def starts_a_cluster(cell):
    """A generation whose engine works in other processes; the rest of such options is tried without one."""
    return cell.get("executor", "local") != "local"


@pytest.mark.slow
@pytest.mark.parametrize("cell", ids([c for c in single_cells("generate") if starts_a_cluster(c)]))
def test_option_of_generation_on_a_cluster(bench, cell):
    right(matrix.run_decoding(bench, cell, matrix.default_run(bench), generate.main), bench.rules)


@pytest.mark.parametrize("cell", ids([c for c in single_cells("generate") if not starts_a_cluster(c)]))
def test_option_of_generation_through_the_command(bench, cell):
    right(matrix.run_decoding(bench, cell, matrix.default_run(bench), generate.main), bench.rules)


def test_every_group_is_tried_or_set_apart():
    tried = {*CROSS, *(key for config in ("train", "generate") for cell in single_cells(config) for key in cell)}
    missing = [g for g in overrides.group_names() if g not in tried and g not in APART and not g.startswith("hydra")]
    assert not missing


def test_assembled_configuration_is_the_composed_one(bench):
    """An option whose YAML set keys outside its own group would be lost in `Bench.config`."""
    for cell in cells.covering_cells():
        assembled, composed = bench.config(cell), compose("train", bench.words(cell))
        assert OmegaConf.to_container(assembled, resolve=True) == OmegaConf.to_container(composed, resolve=True)


def test_the_reviewed_file_is_sound():
    stored = yaml.safe_load(RULES.read_text())
    assert set(stored) == {"illegal", "still", "twins"}
    for rule in LISTED:
        assert len(rule.reason) > 20 and rule.machine in (None, "with cuda", "without cuda") and rule.message
        for key, values in rule.cell.items():
            assert key not in overrides.group_names() or set(values) <= set(overrides.group_options(key)), rule


# What the checks themselves are worth: each is shown a cell that is wrong in the way it looks for.


@pytest.fixture
def bare(bench):
    """An own trial of the default cell: (config, data)."""
    config = bench.config({"adapter": "none"})
    return config, bench.data(config)


def test_a_new_illegal_cell_fails_until_it_is_listed(bench):
    cell = {"rope": "linear", "model.position": "none"}
    outcome = matrix.run_cell(bench, cell)
    assert outcome.status == "refused" and "does not list it" in verdict(outcome, [])
    listed = Rule({"rope": ["linear"], "model.position": ["none"]}, "a reason", "rescales a rotary embedding")
    assert verdict(outcome, [listed]) is None
    assert "promises 'another'" in verdict(outcome, [Rule(listed.cell, "a reason", "another")])


def test_a_listed_cell_that_works_fails():
    rule = Rule({"rope": ["linear"]}, "a reason", "a message")
    assert "take it out" in verdict(Outcome({"rope": "linear"}), [rule])
    assert verdict(Outcome({"rope": "ntk"}), [rule]) is None


def test_a_new_option_joins_by_existing(bench, tmp_path, monkeypatch):
    """A YAML file in the folder is all it takes, and one whose class does not fit is found out."""
    before, conf = cross_cells(), tmp_path / "conf"
    shutil.copytree(overrides.CONF, conf)
    (conf / "optimizer" / "copied.yaml").write_text((conf / "optimizer" / "adamw.yaml").read_text())
    (conf / "optimizer" / "wrong.yaml").write_text("_target_: torch.optim.SGD\n_partial_: true\nlr: 0.1\n")
    monkeypatch.setattr(overrides, "CONF", conf)
    new = [cell for cell in cross_cells() if cell not in before]
    assert len(cross_cells()) == len(before) // len({c["optimizer"] for c in before}) * (len({c["optimizer"] for c in before}) + 2)
    good = next(cell for cell in new if cell["optimizer"] == "copied")
    assert matrix.run_cell(bench, good).status == "trained"
    outcome = matrix.run_cell(bench, {**good, "optimizer": "wrong"})
    assert outcome.status != "trained" and verdict(outcome, LISTED)
    same = [matrix.run_cell(bench, {**good, "optimizer": name}) for name in ("adamw", "copied")]
    mark_twins(same)
    assert "no effect" in same[1].problems[0]


def test_what_should_not_move_is_noticed(bare, bench):
    config, data = bare
    trial = Trial(config, data, seed=1)
    before = trial.weights()
    frozen, idle = list(before)[:2]
    trial.model.get_parameter(frozen).requires_grad_(False)
    trial.step()
    assert moved_wrongly(trial, before, []) == []  # a frozen one takes no part and did not move: its optimizer saw no gradient
    with torch.no_grad():
        trial.model.get_parameter(frozen).add_(1.0)
    assert moved_wrongly(trial, before, []) == [f"moved: {frozen} (1 in all)"]
    trial.received.discard(idle)  # as if weight decay alone had moved it
    assert f"never trained: {idle} (1 in all)" in moved_wrongly(trial, before, [])
    assert len(moved_wrongly(trial, before, [idle.replace(".", r"\.")])) == 1


def test_an_adapter_that_leaves_the_model_trainable_is_noticed(bench):
    adapter = next(name for name in overrides.group_options("adapter") if name != "none")
    config = bench.config({"adapter": adapter})
    trial = Trial(config, bench.data(config), seed=1)
    before = trial.weights()
    name = next(name for name in before if "norm" in name)
    trial.model.get_parameter(name).requires_grad_(True)
    trial.step()
    trial.step()
    assert moved_wrongly(trial, before, []) == [f"trainable although the adapter should freeze it: {name} (1 in all)"]


def test_a_checkpoint_that_forgets_is_noticed(bare):
    config, data = bare
    straight = Trial(config, data, seed=1)
    straight.step()
    probe = next(iter(data.val_batches()))
    hidden, file = straight.forward(probe), straight.save()
    loss = straight.step()
    assert resumed_wrongly(straight, Trial(config, data, seed=2), file, probe, hidden, loss) == []
    file.seek(0)
    forgetful = Trial(config, data, seed=2)
    forgetful.optimizer.load_state_dict = lambda state: None
    assert any("the optimizer ends" in line for line in resumed_wrongly(straight, forgetful, file, probe, hidden, loss))
    file.seek(0)
    elsewhere = Trial(config, data, seed=2)
    elsewhere.stream.load_state_dict = lambda state: None
    assert any(line.startswith("resume: loss") for line in resumed_wrongly(straight, elsewhere, file, probe, hidden, loss))
    file.seek(0)
    other = Trial(config, data, seed=2)
    other.model.register_buffer("extra", torch.zeros(1))
    assert resumed_wrongly(straight, other, file, probe, hidden, loss) == ["state dict: extra is only here"]


def test_memory_is_counted(bare):
    """Without activations: 4 bytes of weight and of gradient for each parameter, and whatever the optimizer keeps."""
    trial = Trial(*bare, seed=1)
    count = sum(p.numel() for p in trial.model.parameters())
    assert trial.memory_bytes() == 8 * count
    trial.step(measure=True)
    tokens = 2 * 48
    assert trial.kept_bytes > tokens * 48 * 4  # at least one float32 (B, T, D)
    assert trial.memory_bytes() - trial.kept_bytes >= 12 * count


@pytest.mark.slow
def test_published_table(tmp_path):
    """Of some cells: each one is a test of its own above."""
    every = 9
    path = matrix.publish(tmp_path, every)
    with open(tmp_path / "matrix.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"trained", "illegal"}, [row for row in rows if row["status"] == "WRONG"]
    cross = len(cross_cells()[::every])
    crossed = [row for row in rows[:cross] if row["status"] == "trained"]  # the others are on record
    assert len(rows) > cross > len(crossed) > 5 and all(row["loss"] and row["memory_kib"] for row in crossed)
    assert all(row["note"] for row in rows if row["status"] == "illegal")
    assert f"{len(rows)} cells" in path.read_text()
