"""`ckpt=` of an adapter that no weights can hold: what may change, tasks and experts that come to it, and `adapter_from`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.adapters.base import adapter_layers, adapter_state
from components.contracts import UserError
from framework.build import build, compose, load_run
from framework.parts import build_parts
from framework.train import train
from tests.framework import test_data_with_tasks as with_tasks
from tests.framework.test_data_with_tasks import ADAPTED, TASKS, words

home, run, call = with_tasks.home, with_tasks.run, with_tasks.call  # fixtures

EXPERT = "{r: 2, alpha: 4, dropout: 0.0}"
MODES = (
    "model=phi4mini", "adapter=moe_lora", "adapter.router=modality", f"+adapter.experts.law={EXPERT}", f"+adapter.experts.med={EXPERT}",
    "+adapter.rules.plus=law", "+adapter.rules.minus=med",
)  # fmt: skip


def state_of(folder):
    return load_run(folder).model.state_dict()


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_how_it_learns_may_change_and_what_it_is_may_not(home, run, tmp_path):
    config = compose("train", words(home, *ADAPTED, "adapter.dropout=0.3", f"ckpt={run}"))
    model = build_parts(config, tmp_path / "a", False).model
    assert not changed(state_of(run), model.state_dict())
    assert {layer.dropout.p for _, layer in adapter_layers(model)} == {0.3}
    for word, said in (
        ("r=3", "r: 3, .* has 2"),
        ("tau=0.1", "tau: 0.1, .* has 0.5"),
        ("use_rslora=true", "use_rslora: True, .* has False"),
    ):
        config = compose("train", words(home, *ADAPTED, f"adapter.{word}", f"ckpt={run}"))
        with pytest.raises(
            UserError, match=rf"^adapter.{said}.*keys that may change are dropout, tasks, train, new_from; .*adapter.task=NAME"
        ):
            build_parts(config, tmp_path / "b", False)
    config = compose("train", words(home, *ADAPTED, f"ckpt={run}", tasks=TASKS[:2]))
    with pytest.raises(UserError, match=r"^adapter.tasks: plus, minus, but the adapter of .* has times too; keep its tasks"):
        build_parts(config, tmp_path / "c", False)


RANDOM = "trained on a base of random weights, which stays as it is"


def test_a_task_comes_to_it_and_the_others_keep_every_bit(home, tmp_path, capsys):
    """Two tasks, then a third: its rows begin at the mean, or at the task that is named; with adapter.train they alone are trained."""
    train(compose("train", words(home, *ADAPTED, "trainer.max_steps=2", tasks=TASKS[:2])), tmp_path / "two")
    said = " ".join(capsys.readouterr().out.split())
    assert RANDOM in said and "train nothing" not in said and "gradient cosine" in said
    assert "plus: loss " in said and "over the tasks: loss " in said and said.count(", token accuracy ") == 3
    old, more = state_of(tmp_path / "two"), words(home, *ADAPTED, f"ckpt={tmp_path / 'two'}", "trainer.max_steps=2")
    whole = build_parts(compose("train", [*more, "adapter.new_from=minus"]), tmp_path / "a", False).model.state_dict()
    mean = build_parts(compose("train", more), tmp_path / "a", False).model.state_dict()
    of_tasks = {key for key in old if key.endswith(("lora_B_w", "lora_lambdas"))}
    assert of_tasks and changed({k: old[k] for k in old if k not in of_tasks}, whole) == set()
    for key in of_tasks:
        assert torch.equal(whole[key], torch.cat([old[key], old[key][1:]])) and torch.equal(mean[key][2], old[key].mean(0))
    with pytest.raises(UserError, match=r"^adapter.new_from: 'minos'; allowed are mean, and .*did you mean minus\?"):
        build_parts(compose("train", [*more, "adapter.new_from=minos"]), tmp_path / "a", False)
    config = compose("train", [*more, "adapter.train=[times]", "optimizer.weight_decay=0.5"])
    capsys.readouterr()
    train(config, tmp_path / "three")
    said = " ".join(capsys.readouterr().out.split())
    assert "rows of plus, minus are drawn in their share, and train nothing; weight: 1e-6 in their entries of data.tasks draws" in said
    assert RANDOM not in said and "over the tasks: " in said and "gradient" not in said.split("over the tasks: ")[1]
    after = state_of(tmp_path / "three")
    assert not changed(old, {key: after[key] for key in old}) and any(not torch.equal(after[f"{k}_new"], mean[k][2:]) for k in of_tasks)
    assert all(after[f"{key}_new"].shape[0] == 1 for key in of_tasks)
    joint = build_parts(compose("train", [*words(home, *ADAPTED), f"ckpt={tmp_path / 'three'}"]), tmp_path / "b", False).model.state_dict()
    assert all(torch.equal(joint[key], torch.cat([after[key], after[f"{key}_new"]])) for key in of_tasks)  # and all go on together


def test_rows_alone_are_the_last_of_the_tasks(home):
    for names in ("[]", "[plus]", "[plus, minus, times]"):
        with pytest.raises(UserError, match=r"^adapter.train: .*null for everything, or the last of the tasks plus, minus, times"):
            build(compose("train", words(home, *ADAPTED, f"adapter.train={names}")).adapter)


def test_experts_are_trained_one_after_another(home, tmp_path, capsys):
    """The first keeps every bit while the second is trained, and a third may come to them."""
    base = words(home, *MODES, "trainer.max_steps=2", tasks=TASKS[:2])
    train(compose("train", [*base, "adapter.train=[law]"]), tmp_path / "law")
    capsys.readouterr()
    train(compose("train", [*base, "adapter.train=[med]", f"ckpt={tmp_path / 'law'}"]), tmp_path / "med")
    assert "rows of plus are drawn" in capsys.readouterr().out
    before, after = state_of(tmp_path / "law"), state_of(tmp_path / "med")
    moved = changed(before, after)
    assert moved and all(key.endswith(".med") for key in moved)
    more = words(home, *MODES, f"+adapter.experts.tax={EXPERT}", "+adapter.rules.times=tax", f"ckpt={tmp_path / 'med'}")
    grown = build_parts(compose("train", more), tmp_path / "a", False).model
    assert not changed(after, grown.state_dict()) and any(key.endswith(".tax") for key in adapter_state(grown))
    with pytest.raises(UserError, match=r"^adapter.experts.law.r: 3, but the adapter of .* has 2"):
        build_parts(compose("train", [*base, "adapter.experts.law.r=3", f"ckpt={tmp_path / 'med'}"]), tmp_path / "a", False)
    for word in ("+adapter.experts.law.alpha_pattern={o_proj: 400}", "adapter.rules.plus=med"):  # of what is there already
        with pytest.raises(UserError, match=r"^adapter.(experts.law.alpha_pattern|rules.plus).*: .*, but the adapter of"):
            build_parts(compose("train", [*base, word, f"ckpt={tmp_path / 'med'}"]), tmp_path / "a", False)


def test_one_task_or_one_expert_is_gone_on_with_too(home, tmp_path):
    """The first is not put into the base, where the second would get it, and its B, without which no row of a task moves, is there."""
    train(compose("train", words(home, *ADAPTED, "trainer.max_steps=2", tasks=TASKS[:1])), tmp_path / "one")
    more = words(home, *ADAPTED, "adapter.train=[minus]", f"ckpt={tmp_path / 'one'}", tasks=TASKS[:2])
    old, new = state_of(tmp_path / "one"), build_parts(compose("train", more), tmp_path / "a", False).model.state_dict()
    assert not changed(old, new) and any(new[key].any() for key in new if key.endswith("lora_B"))
    first = [word for word in MODES if "med" not in word]
    train(compose("train", words(home, *first, "trainer.max_steps=2", tasks=TASKS[:1])), tmp_path / "law")
    more = words(home, *MODES, "adapter.train=[med]", f"ckpt={tmp_path / 'law'}", tasks=TASKS[:2])
    old, new = state_of(tmp_path / "law"), build_parts(compose("train", more), tmp_path / "a", False).model.state_dict()
    assert not changed(old, new) and any(new[key].any() for key in new if key.endswith("lora_B.law"))


def test_what_is_for_a_learned_adapter_is_refused_at_its_beginning(home, tmp_path):
    for word in ("train=[times]", "new_from=plus"):
        with pytest.raises(UserError, match=rf"^adapter.{word.split('=')[0]}: .*this one begins; give ckpt=RUN_DIR"):
            build_parts(compose("train", words(home, *ADAPTED, f"adapter.{word}")), tmp_path / "a", False)


def test_a_token_router_asks_for_no_task_and_is_gone_on_with(home, call, tmp_path):
    routed = words(home, "model=phi4mini", "adapter=moe_lora", "trainer.max_steps=2")
    train(compose("train", routed), tmp_path / "run")
    code, _, err = call(f"ckpt={tmp_path / 'run'}", "prompt=a")
    assert code == 0, err
    code, _, err = call(f"ckpt={tmp_path / 'run'}", "prompt=a", "adapter.merge=true")
    assert code == 2 and "weighs its experts anew for each token; leave it unmerged" in err and "adapter.task" not in err
    code, _, err = call(f"ckpt={tmp_path / 'run'}", "prompt=a", "adapter.task=plus")
    assert code == 2 and "adapter.task: 'plus', but the adapter of" in err and "weighs its parts by the token, whatever the task" in err
    model = build_parts(compose("train", [*routed, "adapter.aux.balance=0.1", f"ckpt={tmp_path / 'run'}"]), tmp_path / "a", False).model
    assert not changed(state_of(tmp_path / "run"), model.state_dict())
    with pytest.raises(UserError, match=r"weighs its parts anew for each token.*go on with the same adapter"):
        build_parts(compose("train", words(home, "model=phi4mini", f"ckpt={tmp_path / 'run'}")), tmp_path / "a", False)


def test_an_adapter_starts_from_a_folder_or_a_file_of_published_code(home, run, tmp_path):
    loaded = load_run(run)
    adapter = build(loaded.cfg.adapter)
    adapter.save(loaded.model, tmp_path / "folder")
    torch.save({f"module.{key}": value for key, value in adapter_state(loaded.model).items()}, tmp_path / "file.pt")
    own = adapter_state(loaded.model)
    for start in ("folder", "file.pt"):
        config = compose("train", words(home, *ADAPTED, f"adapter_from={tmp_path / start}"))
        found = adapter_state(build_parts(config, tmp_path / "a", False).model)
        assert found.keys() == own.keys() and not changed(own, found)
    tensors = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    save_file({**tensors, "lora_Z": torch.zeros(1)}, tmp_path / "folder" / "adapter_model.safetensors")
    for words_, said in (
        (ADAPTED, "holds 'lora_Z', which this model has no place for"), ((*ADAPTED, "adapter.r=4"), "r is 2; this adapter has 4"),
        (("model=phi4mini",), "adapter_from: .*this run has no adapter"), ((*ADAPTED, f"ckpt={run}"), "adapter_from: .*is gone on with"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            build_parts(compose("train", words(home, *words_, f"adapter_from={tmp_path / 'folder'}")), tmp_path / "a", False)
