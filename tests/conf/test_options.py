"""Every option of every group composes, resolves, names real classes and only keys that they take."""

import re
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from components.contracts import UserError
from framework.build import compose
from framework.overrides import CONF, group_names, group_options
from framework.resolvers import register
from tests.components.models.conftest import load_config

TRAIN = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
GENERATE = yaml.safe_load((CONF / "generate.yaml").read_text())["defaults"]


def groups_of(defaults):
    return {key.removeprefix("optional ").removeprefix("override /") for entry in defaults if isinstance(entry, dict) for key in entry}


def cells():
    for group in group_names():
        if group in ("local", "model/overlay", "hydra"):
            continue
        for option in group_options(group):
            config = "train" if group in groups_of(TRAIN) else "generate" if group in groups_of(GENERATE) else None
            if config is not None and not (group == "task" and option in ("answer", "batch", "evaluate", "rollouts", "synthesize")):
                yield pytest.param(config, group, option, id=f"{group}={option}")


def whole_experiment(option: str) -> str:
    """Its text, with that of the experiment it builds on."""
    text = (CONF / "experiment" / f"{option}.yaml").read_text()
    return text + "".join(whole_experiment(base) for base in re.findall(r"^  - (\w+)$", text, re.MULTILINE) if base != "_self_")


@pytest.mark.parametrize(("config", "group", "option"), cells())
def test_option_composes_and_passes_every_check(config, group, option):
    overrides = [f"{group}={option}"]
    if group == "data" and option in ("text", "chat", "synthllm", "synthllm_lessons"):
        overrides.append("data.path=anything.txt")
    if (group, option) == ("data", "multitask"):
        overrides.append("data.tasks={one: {path: anything.json}}")
    if (group, option) in (("data", "preference"), ("task", "dpo")):
        overrides += ["task=dpo", "data=preference"]
    if (group, option) == ("engine", "openai"):
        overrides.append("engine.base_url=http://127.0.0.1:1/v1")
    if group == "eval":
        overrides.append("task=evaluate")
    if group == "task" and option == "sft":
        overrides += ["data=chat", "data.path=anything.jsonl"]
    text = whole_experiment(option) if group == "experiment" else ""
    arms = re.search(r"^arms:.*\n  (\w+):", text, re.MULTILINE)  # the first of them
    if "task=dpo" in overrides or "/task: dpo" in text:
        overrides += ["data.path=anything.jsonl", "ckpt=anywhere"]
    if group == "task" and option == "rope_search":
        overrides.append("task.target_len=1024")
    if (group == "trainer" and option in ("gpu", "ddp", "fsdp")) or "/trainer: gpu" in text:
        overrides.append("trainer.accelerator=cpu")  # no CUDA device where the tests run; everything else of the option is checked
    if "stage_one: ???" in text:
        overrides += ["stage_one=anywhere", "optimizer.lr=1e-3"]  # which the first stage chooses
    for key, value in (
        ("stages", "ckpt=anywhere"),
        ("  base", "stages.base=x"),
        ("  search", "stages.search=x"),
        ("  candidates", "stages.candidates=x"),
        ("  train", "stages.train=x"),
        ("rows_dir", "rows_dir=anywhere"),
        ("    direct", "task.runs={direct: anywhere, base: anywhere}"),
        ("rule", "rule=yarn"),
        ("attention", "attention=own"),
        ("arm", f"arm={arms and arms[1]}"),
        ("texts", "texts=anywhere"),
        ("level", "level=3"),
        ("size", "size=4k"),
        ("start", "start=scratch"),
        ("starts", "starts.base=anywhere"),
    ):
        if re.search(rf"^{key}:[ \n]", text, re.MULTILINE):  # an experiment of several stages
            overrides.append(value)
    if "  factors: ${run_of" in text:
        overrides.append("rope.factors=anywhere.json")
    compose(config, overrides)


@pytest.mark.parametrize("model", group_options("model"))
@pytest.mark.parametrize("size", ["test", "tiny", "small"])
def test_every_model_has_every_common_size(model, size):
    compose("train", [f"model={model}", f"model/size={size}"])


def test_every_yaml_belongs_to_a_group_or_is_a_root():
    known = {p for group in group_names() for p in (CONF / group).glob("*.yaml")} | {CONF / "train.yaml", CONF / "generate.yaml"}
    assert set(CONF.rglob("*.yaml")) == known
    assert not list(Path(CONF).rglob("*.yml"))


def test_overlay_follows_both_choices():
    config = compose("train", ["model=phi4mini", "model/size=test"])
    other = compose("train", ["model=samba", "model/size=test"])
    assert config.model._target_ != other.model._target_
    assert "state_size" in other.model and "state_size" not in config.model


# Where the parts meet: a variant's numbers at a size, above those of the size and of the model at that size; and a variant without any.
MEETINGS = [("421m", "mamba_only"), ("421m", "swa_heads_6_1"), ("tiny", "window_512"), ("1b3", "swa_only"), ("3b8", "mamba_swa_mlp")]


def composed_as_in_the_model_tests(size, variant):
    """tests/components/models reads the same files without Hydra; this is what keeps the two orders the same."""
    node = compose("train", ["model=samba", f"model/size={size}", f"model/variant={variant}", "data.seq_len=64"]).model
    assert OmegaConf.to_container(node, resolve=True) == OmegaConf.to_container(load_config("samba", size, variant), resolve=True)


@pytest.mark.parametrize(("size", "variant"), MEETINGS)
def test_variant_meets_size(size, variant):
    composed_as_in_the_model_tests(size, variant)


@pytest.mark.slow
@pytest.mark.parametrize("size", group_options("model/size"))
@pytest.mark.parametrize("variant", group_options("model/variant"))
def test_every_variant_meets_every_size(size, variant):
    composed_as_in_the_model_tests(size, variant)


def test_variants_follow_a_word_and_yield_to_a_key():
    """An ablation is one override; a key typed besides it wins, and so does a typed size."""
    node = compose("train", ["model/variant=mamba_only", "model/size=421m", "model.num_layers=48"]).model
    assert (node.num_layers, node.hidden_size, node.layer_pattern, node.mlp_pattern) == (48, 1024, ["mamba"], [False])


def test_every_overlay_has_a_model_a_size_and_perhaps_a_variant():
    """A misspelt file would never be read, since overlays are optional."""
    sizes, variants = group_options("model/size"), ["", *(f"{v}_" for v in group_options("model/variant"))]
    names = {f"{model}_{variant}{size}" for model in group_options("model") for variant in variants for size in sizes}
    assert set(group_options("model/overlay")) <= names


def test_every_overlay_of_an_optimizer_has_an_optimizer_and_a_size():
    names = {f"{optimizer}_{size}" for optimizer in group_options("optimizer") for size in group_options("model/size")}
    assert set(group_options("optimizer/overlay")) <= names
    assert compose("train", ["optimizer=cosmos", "model/size=small"]).optimizer.rank == 64
    assert compose("train", ["optimizer=cosmos"]).optimizer.rank == 16
    assert compose("train", ["optimizer=cosmos", "optimizer.rank=8"]).optimizer.rank == 8


@pytest.mark.parametrize("variant", ["swa_only", "mamba_swa_mlp"])
def test_a_variant_of_another_model_is_a_mistake_of_the_user(variant, capsys):
    import train

    assert train.main(["model=phi4mini", f"model/variant={variant}"]) == 2
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "error" in line]
    assert lines[0] == "error: model.layer_pattern: unknown key of Phi4Mini" and "Traceback" not in said.err


def test_what_is_asked_for_is_named_itself_not_what_follows_it():
    with pytest.raises(UserError) as refused:
        compose("train", ["experiment=mtl_lora_realtext_base"])
    assert str(refused.value) == "texts: no value given; write texts=VALUE"


def test_resolvers_can_be_registered_twice():
    register()
    register()


def test_python_api_equals_command_line(capsys, monkeypatch):
    """`compose` gives what `python train.py --cfg job --resolve` prints."""
    import train

    words = ["model=phi4mini", "model/size=test", "seed=7", "paths.output_dir=somewhere"]
    assert train.main([*words, "--cfg", "job", "--resolve"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == OmegaConf.to_container(compose("train", words), resolve=True)


def test_help_and_cfg_import_nothing_heavy():
    """`--help` and `--cfg job --resolve` answer at once because neither torch nor Lightning is imported before composition."""
    import subprocess
    import sys

    code = (
        "import sys, train\n"
        "assert train.main(['--help']) == 0 and train.main(['--cfg', 'job', '--resolve']) == 0\n"
        "heavy = {'torch', 'lightning', 'wandb', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parent)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30  # a hang, not a speed claim
    for word in ("model", "samba", "model/variant", "mamba_swa_mlp", "optimizer", "muon"):
        assert word in done.stdout
