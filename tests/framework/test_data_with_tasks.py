"""Data with tasks and adapters with tasks together: names from the configuration, training, resuming, and what each command refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import generate as entry_point
from components.adapters.base import merge, task_ids
from components.contracts import Batch, UserError
from framework.build import ConfigErrors, compose, load_run
from framework.callbacks.samples import sample_writer
from framework.parts import build_parts, without_adapter
from framework.procedure import check_procedure
from framework.prompts import Renderer
from framework.resolvers import task_names
from framework.train import train
from tests.framework.test_generate import refused
from tests.framework.training import Killed, final_state

TASKS = ("plus", "minus", "times")
SIGNS = dict(zip(TASKS, "+-*", strict=True))
ADAPTED = ("model=phi4mini", "adapter=mtl_lora", "adapter.r=2")


def example(task: str, i: int) -> dict[str, str]:
    question = f"{i % 10} {SIGNS[task]} {i // 10}"
    return {"instruction": question, "input": "", "output": f"it is {eval(question) % 10}", "answer": str(i % 2 == 0).lower()}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for task in TASKS:
        (folder / f"{task}.json").write_text(json.dumps([example(task, i) for i in range(60)]))
    return folder


def words(home: Path, *more: str, tasks=TASKS) -> list[str]:
    named = ", ".join(f"{task}: {{path: {home / task}.json}}" for task in tasks)
    return [
        "model/size=test", "data=multitask", f"data.tasks={{{named}}}", "data.tokenizer.kind=bytes", "data.seq_len=64", "data.batch_size=4",
        "data.template.without_input='Do {instruction}: '", "trainer.max_steps=4", "checkpoint.every_steps=2", "validate.every_steps=100",
        "samples.every_steps=0", "samples.max_new_tokens=4", "logger=none", f"paths.cache_dir={home / 'cache'}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(home) -> Path:
    """A short run with an adapter of three tasks, whose B is made large enough for the tasks to differ."""
    folder = home / "outputs" / "adapted"
    config = compose("train", words(home, *ADAPTED, "samples.every_steps=1"))  # samples between the steps must not disturb them
    train(config, folder)
    file = folder / "checkpoints" / "step000004.ckpt"
    state = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in state["state_dict"].items():
        if "lora_" in name:
            weight += 0.5 * torch.randn(weight.shape, generator=generator)
    torch.save(state, file)
    return folder


@pytest.fixture
def call(home, run, tmp_path, capfd):
    def run_it(*more: str) -> tuple[int, str, str]:
        places = [f"paths.root={home / 'outputs'}", f"paths.cache_dir={home / 'cache'}", f"hydra.run.dir={tmp_path / 'out'}"]
        bound = [] if "task=evaluate" in more else ["max_new_tokens=6"]  # an evaluation has its own
        code = entry_point.main([*places, *bound, "decode=greedy", f"ckpt={run}", *more])
        out, err = capfd.readouterr()
        return code, out, err

    return run_it


def test_names_come_from_the_configuration_alone(home):
    config = compose("train", words(home, *ADAPTED))
    assert config.adapter.tasks == list(TASKS) == task_names(config.data)
    turned = compose("train", words(home, *ADAPTED, tasks=TASKS[::-1]))
    assert turned.adapter.tasks == list(TASKS[::-1])
    assert compose("train", ["adapter=mtl_lora"]).adapter.tasks == ["all"]
    assert task_names(OmegaConf.create({"tasks": "???"})) == task_names({"tasks": {}}) == ["all"]
    assert task_names({"tasks": ["b", "a"]}) == ["b", "a"]


@pytest.mark.parametrize(
    ("data", "tasks", "said"),
    [
        ("multitask", "[plus,times,minus]", "those of the data are plus, minus, times, in this order"),
        ("multitask", "[plus]", "those of the data are plus, minus, times, in this order"),
        ("stdlib", "[plus,minus]", "this data option has no tasks"),
    ],
)
def test_other_names_than_those_of_the_data_are_refused(home, data, tasks, said):
    given = words(home) if data == "multitask" else ["model/size=test"]
    with pytest.raises(ConfigErrors, match=f"adapter.tasks: .*{said}") as caught:
        compose("train", [*given, "adapter=mtl_lora", f"adapter.tasks={tasks}"])
    assert len(caught.value.lines) == 1


def test_training_measures_each_task(run):
    metrics = json.loads((run / "metrics.json").read_text())
    for task in TASKS:
        assert 0 < metrics[f"eval/{task}/loss"] < 10 and 0 <= metrics[f"eval/{task}/accuracy"] <= 1
    assert OmegaConf.load(run / "config.yaml").adapter.tasks == list(TASKS)


def test_the_tasks_of_the_batches_reach_the_adapter(home, tmp_path):
    """In a step over rows of one task, what belongs to that task alone moves, and nothing of the others.

    Its own weights of the mixture need not move: over rows of one task, Adam's first step makes all B equal (their gradients differ by a
    factor), and a mixture of equal ones has no gradient but that of rounding.
    """
    weights = [f"data.tasks.{task}.weight={weight}" for task, weight in zip(TASKS, (1e-9, 1, 1e-9), strict=True)]
    config = compose("train", words(home, *ADAPTED, *(f"+{word}" for word in weights), "trainer.max_steps=2", "checkpoint.every_steps=1"))
    train(config, tmp_path)
    before, after = (final_state(tmp_path, step)["state_dict"] for step in (1, 2))  # before the first, B is 0 and nothing else moves
    for name, old in before.items():
        if name.endswith(("lora_lambdas", "lora_B_w")):
            moved = [(old[i] != after[name][i]).any().item() for i in range(3)]
            assert moved == [False, moved[1] if name.endswith("lora_B_w") else True, False], name


def test_a_killed_run_goes_on_exactly(home, tmp_path, monkeypatch):
    from framework.callbacks.checkpoints import Checkpoints

    config = compose("train", words(home, *ADAPTED, "data.mixing=temperature"))
    train(config, tmp_path / "whole")
    step = Checkpoints.on_step_end

    def killed(self, trainer, module, number):
        step(self, trainer, module, number)
        if number == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "on_step_end", killed)
        train(config, tmp_path / "cut")
    train(config, tmp_path / "cut", resuming=True)
    a, b = (final_state(tmp_path / name, 4) for name in ("whole", "cut"))
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])


def greedy(model, ids, tokens, stops):
    """Uncached greedy continuation."""
    ids = list(ids)
    for _ in range(tokens):
        with torch.no_grad():
            logits = model.logits(model(Batch(torch.tensor([ids]))).hidden[0, -1])
        logits[257:] = -torch.inf  # bytes and the end of text are what a byte tokenizer says; <|end|> is allowed below
        ids.append(logits.argmax().item())
        if ids[-1] in stops:
            break
    return ids


def test_each_task_answers_by_its_own_weights(call, run):
    texts = {}
    for task in TASKS[:2]:
        loaded = load_run(run)
        prompt = [loaded.tokenizer.eot_id, *loaded.tokenizer.encode("Do 3 + 4: ")]  # the run's template round the instruction
        merge(loaded.model, task)
        said = greedy(loaded.model, prompt, 6, loaded.tokenizer.stop_ids)[len(prompt) :]
        code, out, err = call("prompt='3 + 4'", f"adapter.task={task}")
        assert code == 0, err
        assert out.rstrip("\n") == loaded.tokenizer.decode(said).rstrip("\n")
        assert call("prompt='3 + 4'", f"adapter.task={task}", "adapter.merge=true")[1] == out
        texts[task] = out
    assert len(set(texts.values())) == 2
    assert f"adapter.task={task}" in err  # the next command has it too


def test_without_a_prompt_it_goes_on_with_a_question_of_that_task(call):
    code, out, err = call("adapter.task=times")
    assert code == 0 and "Do " in out and " * " in out, err


def test_every_task_is_asked_under_its_own_id(call, tmp_path):
    """What each task gets among all is what it says when it is asked alone; another task says something else to the same question."""

    def answers(*more):
        code, _, err = call("task=evaluate", "eval=choice", "eval.items=2", "eval.max_new_tokens=4", *more)
        assert code == 0, err
        lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
        (tmp_path / "out" / "results.jsonl").unlink()
        return {(line["task"], line["asked"]): line["got"] for line in lines}, json.loads((tmp_path / "out" / "metrics.json").read_text())

    every, metrics = answers()
    assert len(every) == 6 and {task for task, _ in every} == set(TASKS)
    assert all(question.startswith("Do ") and f" {SIGNS[task]} " in question for task, question in every)
    for task in TASKS:
        assert metrics[f"choice/{task}/unparsable"] == sum(
            "true" not in said and "false" not in said for (name, _), said in every.items() if name == task
        )
    assert metrics["choice/score"] == pytest.approx(sum(metrics[f"choice/{task}/score"] for task in TASKS) / 3)
    alone, _ = answers("adapter.task=minus")
    assert alone == {key: said for key, said in every.items() if key[0] == "minus"}
    base, _ = answers("adapter.task=-1")
    assert base.keys() == every.keys() and base != every


def test_generate_refuses_a_missing_or_unknown_task(call, home):
    refused(call("prompt=a"), "adapter.task: null", "plus | minus | times")
    refused(call("prompt=a", "adapter.merge=true"), "adapter.task: null")
    refused(call("prompt=a", "adapter.task=tims"), "'tims'", "did you mean times?")
    refused(call("prompt=a", "adapter.task=[plus]"), "adapter.task", "is not")
    refused(call("task=export"), "adapter.task: null", "adapter.task=plus")


@pytest.mark.slow
def test_a_run_without_tasks_takes_none(call, home):
    plain = home / "outputs" / "plain"
    train(compose("train", words(home, "model=phi4mini", "adapter=lora", "trainer.max_steps=1", "checkpoint.every_steps=1")), plain)
    refused(call(f"ckpt={plain}", "prompt=a", "adapter.task=plus"), "adapter.task: 'plus'", "without an adapter that has tasks")
    code, _, err = call(f"ckpt={plain}", "prompt=a")
    assert code == 0, err


@pytest.mark.parametrize("more", [(), pytest.param(("adapter.merge=true",), marks=pytest.mark.slow)])
def test_an_export_holds_the_weights_of_the_task(call, run, tmp_path, more):
    code, _, err = call("task=export", "adapter.task=minus", f"task.to={tmp_path / 'folder'}", *more)
    assert code == 0, err
    written = load_file(tmp_path / "folder" / "model.safetensors")
    loaded = load_run(run)
    merge(loaded.model, "minus")
    merged = {key.replace(".base_layer", ""): value for key, value in loaded.model.state_dict().items() if "lora_" not in key}
    assert len(merged) == len(written)
    for key, value in merged.items():
        assert any(torch.equal(value, other) for other in written.values() if value.shape == other.shape), key
    same = [call("prompt='3 + 4'", *words)[:2] for words in (["adapter.task=minus"], [f"ckpt={tmp_path / 'folder'}"])]
    assert same[0] == same[1] and same[0][0] == 0  # the run's template goes along


def test_training_on_from_several_tasks_is_refused(home, run, tmp_path, capsys):
    config = compose("train", words(home, "model=phi4mini", f"ckpt={run}"))
    with pytest.raises(UserError, match=r"ckpt: .* has an adapter with 3 tasks \(plus, minus, times\).*task=export adapter.task=NAME"):
        build_parts(config, tmp_path, False)
    loaded = load_run(run)
    model = without_adapter(loaded, "minus")
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(f"the adapter of {run}, task minus, was merged into a copy of its weights; the run is as it was")
    assert not len(task_ids(model)) and not any("lora" in name for name, _ in model.named_parameters())


def test_training_on_with_the_same_adapter_goes_on_with_its_weights(home, run, tmp_path):
    """The adapter's weights are those of the run and train on, its base stays; with another rank it is another adapter."""
    before = load_run(run).model.state_dict()
    config = compose("train", words(home, *ADAPTED, f"ckpt={run}", "trainer.max_steps=2"))
    parts = build_parts(config, tmp_path / "parts", False)
    assert all(torch.equal(value, before[key]) for key, value in parts.model.state_dict().items())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in parts.model.named_parameters())
    train(config, tmp_path / "run")
    after = load_run(tmp_path / "run").model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed and all("lora_" in key for key in changed)
    other = compose("train", words(home, *ADAPTED, "adapter.r=3", f"ckpt={run}"))
    with pytest.raises(UserError, match=r"^adapter.r: 3, but the adapter of .* has 2"):
        build_parts(other, tmp_path / "other", False)


def test_samples_of_a_run_with_tasks(home, run):
    """The first task speaks, whatever ids the last batch left behind."""
    config = compose("train", words(home, *ADAPTED))
    parts = build_parts(config, home / "nowhere", False)
    holder = task_ids(parts.model)
    holder.set(torch.full((4, 64), 2))
    text = sample_writer(parts.model.eval(), parts.tokenizer, parts.data, None, 4, 1)()
    assert " + " in text and torch.equal(holder.ids, torch.full((4, 64), 2))  # as before
    assert Renderer(parts.tokenizer, parts.data)("1 + 1") == [parts.tokenizer.eot_id, *b"Do 1 + 1: "]


def test_what_works_on_one_model_refuses_several_tasks(home, run, tmp_path):
    for task in ("decode_cost", "rope_search"):
        extra = ["task.target_len=128"] if task == "rope_search" else []
        config = compose("train", words(home, *ADAPTED, f"ckpt={run}", f"task={task}", *extra))
        with pytest.raises(UserError, match=r"adapter: it has 3 tasks \(plus, minus, times\).*task=export adapter.task=NAME"):
            check_procedure(config, build_parts(config, tmp_path, False))
