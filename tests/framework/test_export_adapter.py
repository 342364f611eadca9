"""task=export task.adapter=keep: the base and plain LoRAs beside it, which PEFT puts on transformers' model."""

import json

import pytest
import torch

import generate
from components.adapters.base import task_ids
from framework import build
from tests.components.interop.models import logits
from tests.framework.interchange import phi_run

IDS = torch.arange(40)[None] * 31 % 256
ADAPTERS = {
    "lora": ["adapter=lora", "adapter.r=3"],
    "patterned": ["adapter=lora", "adapter.r=3", "+adapter.rank_pattern={mlp.down_proj: 2}", "adapter.use_rslora=true"],
    "matched": ["adapter=lora", "adapter.r=null", "adapter.match_parameters=5000", "adapter.targets='role:o,down'"],
    "mtl_lora": ["adapter=mtl_lora", "adapter.r=3", "data=transforms", "data.tasks=[copy,sort]"],
    "dora": ["adapter=dora"],
    "moe_lora": ["adapter=moe_lora"],
    "biases": ["adapter=lora", "adapter.modules_to_save=[norm]"],
    "none": [],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def export(home, tmp_path, capfd):
    """export(name of ADAPTERS, words...) -> (exit code, stderr); the folder is tmp_path / "hf"."""

    def run_it(name, *words):
        if not (home / name).exists():
            phi_run(home / name, "rope=none", *ADAPTERS[name])
        places = [f"paths.root={home}", f"hydra.run.dir={tmp_path / 'out'}", f"ckpt={home / name}", f"task.to={tmp_path / 'hf'}"]
        code = generate.main([*places, "task=export", "task.adapter=keep", *words])
        return code, capfd.readouterr().err

    return run_it


def theirs(folder, adapter):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, folder / "adapters" / adapter).eval()(IDS).logits


def close(ours, found):
    return (found[..., : ours.shape[-1]] - ours).abs().max() <= 1e-5 * ours.abs().max() + 2e-6


@pytest.mark.parametrize("name", ["lora", "patterned", "matched"])
def test_peft_reads_it_beside_the_base(home, export, tmp_path, name):
    assert export(name)[0] == 0
    run = build.load_run(home / name)
    assert close(logits(run.model, IDS), theirs(tmp_path / "hf", "adapter"))
    config = json.loads((tmp_path / "hf" / "adapters" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "hf") and config["task_type"] == "CAUSAL_LM"
    base = build.load_run(tmp_path / "hf", cache_dir=tmp_path / "cache")
    assert not close(logits(run.model, IDS), logits(base.model, IDS))  # what stands beside it matters


def test_every_task_is_a_lora_of_its_own(home, export, tmp_path):
    assert export("mtl_lora")[0] == 0
    assert sorted(path.name for path in (tmp_path / "hf" / "adapters").iterdir()) == ["copy", "sort"]
    run = build.load_run(home / "mtl_lora")
    found = {}
    for task in ("copy", "sort"):
        task_ids(run.model).set(task)
        found[task] = logits(run.model, IDS)
        assert close(found[task], theirs(tmp_path / "hf", task))
    assert not close(found["copy"], found["sort"])


def test_one_task_alone(export, tmp_path):
    code, err = export("mtl_lora", "adapter.task=sort")
    assert code == 0, err
    assert [path.name for path in (tmp_path / "hf" / "adapters").iterdir()] == ["sort"]


def test_merged_and_kept_exclude_each_other(export, tmp_path):
    code, err = export("lora", "adapter.merge=true")
    assert code == 2 and "adapter.merge: true puts the adapter into the weights; drop one of them" in err and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dora", "use_dora=True"),
        ("moe_lora", "MoELoRA is no plain LoRA"),
        ("biases", "modules_to_save=['norm']"),
        ("none", "trained without an adapter"),
    ],
)
def test_what_is_no_plain_lora(export, tmp_path, name, words):
    code, err = export(name)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: task.adapter: keep, but") and words in lines[0], err
    assert not (tmp_path / "hf").exists() and "Traceback" not in err
