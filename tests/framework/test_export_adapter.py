"""task=export task.adapter=keep: the base and plain LoRAs beside it, which PEFT puts on transformers' model."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from components.adapters.base import adapter_layers, task_ids
from components.adapters.base.peft_files import WEIGHTS
from components.contracts import SamplingParams, UserError
from components.interop import adapters as interop
from framework import build
from framework.engines.native import NativeEngine
from framework.export import check_close, probe, widened
from framework.parts import start_model
from tests.components.interop.models import logits
from tests.framework.interchange import phi_run

IDS = torch.arange(40)[None] * 31 % 256
ADAPTERS = {
    "lora": ["adapter=lora", "adapter.r=3"],
    "patterned": ["adapter=lora", "adapter.r=3", "+adapter.rank_pattern={mlp.down_proj: 2}", "adapter.use_rslora=true"],
    "matched": ["adapter=lora", "adapter.r=null", "adapter.match_parameters=5000", "adapter.targets='role:o,down'"],
    "embedded": ["adapter=lora", "adapter.targets='role:embedding,o'", "model.tie_embeddings=false"],
    "mtl_lora": ["adapter=mtl_lora", "adapter.r=3", "data=transforms", "data.tasks=[copy,sort]"],
    "dora": ["adapter=dora"],
    "moe_lora": ["adapter=moe_lora"],
    "modes": [
        "adapter=moe_lora",
        "adapter.router=modality",
        "data=transforms",
        "data.tasks=[copy,sort,reverse,rotate]",
        *(
            "+adapter.experts.a={r: 3, alpha: 6, dropout: 0.0}",
            "+adapter.experts.b={r: 2, alpha: 8, dropout: 0.0}",
            "+adapter.rules={copy: null, sort: a, reverse: b, rotate: a}",
        ),
    ],
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


def beside(folder, adapter):
    """transformers' model of the base with PEFT's adapter."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "adapters" / adapter).eval()


def theirs(folder, adapter):
    with torch.no_grad():
        return beside(folder, adapter)(IDS).logits


def close(ours, found):
    """Within 4e-5 of the largest logit: these weights are drawn wide, and two orders of float32 sums were seen 9e-6 to 1.5e-5 apart."""
    return (found[..., : ours.shape[-1]] - ours).abs().max() <= 4e-5 * ours.abs().max()


@pytest.mark.parametrize("name", ["lora", "patterned", "matched", "embedded"])
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


PROMPTS = [[1, 2, 3, 4, 5], [200, 100, 50], [7]]


def greedy(run):
    """16 tokens of ours after each prompt."""
    found = NativeEngine(run.model, run.tokenizer).generate(PROMPTS, SamplingParams(max_new_tokens=16, temperature=0.0))
    return [completion.token_ids for completion in found]


def their_greedy(folder, adapter):
    model = beside(folder, adapter)
    found = [model.generate(input_ids=torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0].tolist() for ids in PROMPTS]
    return [tokens[len(ids) :] for tokens, ids in zip(found, PROMPTS, strict=True)]


@pytest.mark.parametrize(("name", "tasks"), [("lora", [None]), ("mtl_lora", ["copy", "sort"])])
def test_peft_generates_what_we_generate(home, export, tmp_path, name, tasks):
    assert export(name)[0] == 0
    run, said = build.load_run(home / name), []
    for task in tasks:
        task_ids(run.model).set(task)
        said.append(greedy(run))
        assert their_greedy(tmp_path / "hf", task or "adapter") == said[-1]
    base = greedy(build.load_run(tmp_path / "hf", cache_dir=tmp_path / "cache"))
    assert base not in said and all(said.count(one) == 1 for one in said)


@pytest.fixture
def ask(home, tmp_path, capfd):
    """ask(ckpt, words...) -> (exit code, stdout, stderr) of a greedy answer to a fixed prompt."""

    def run_it(ckpt, *words):
        places = [f"paths.root={home}", f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'out'}"]
        code = generate.main([*places, f"ckpt={ckpt}", "decode=greedy", "max_new_tokens=12", "prompt=ab", *words])
        return code, *capfd.readouterr()

    return run_it


def test_a_kept_adapter_answers_by_its_name(home, export, ask, tmp_path):
    """As its task does in the run; without a name the base answers, and says so."""
    code, err = export("mtl_lora")
    assert code == 0, err
    folder, said = tmp_path / "hf", {}
    for task in ("copy", "sort"):
        code, said[task], err = ask(folder, f"adapter.task={task}")
        assert code == 0, err
        assert said[task] == ask(home / "mtl_lora", f"adapter.task={task}")[1] and "answers alone" not in err
    code, base, err = ask(folder)
    assert code == 0 and f"ckpt={folder}: the base answers alone; the adapters beside it: adapter.task=copy | sort" in err
    assert base == ask(folder, "adapter.task=-1")[1] == ask(home / "mtl_lora", "adapter.task=-1")[1] and len({base, *said.values()}) == 3
    code, _, err = ask(folder, "adapter.task=sorted")
    assert code == 2 and f"adapter.task: 'sorted'; the adapters in {folder}/adapters are copy, sort; did you mean 'sort'?" in err


def test_the_mode_of_a_kept_expert_names_it_too(home, export, ask, tmp_path):
    assert export("modes")[0] == 0
    answers = {name: ask(tmp_path / "hf", f"adapter.task={name}")[1] for name in ("copy", "reverse", "b")}
    assert answers["copy"] == ask(home / "modes", "adapter.task=copy")[1] != answers["b"] == answers["reverse"]
    assert answers["b"] == ask(home / "modes", "adapter.task=reverse")[1]


def test_it_starts_an_adapter_on_its_own_base(home, export, tmp_path):
    """The folder has the module names of transformers, which are mapped to ours; one with those of neither is refused as it is."""
    assert export("lora")[0] == 0
    folder = tmp_path / "hf" / "adapters" / "adapter"

    def start(*words):
        base = build.load_run(tmp_path / "hf", cache_dir=tmp_path / "cache")
        config = build.compose("train", [*ADAPTERS["lora"], *words, f"adapter_from={folder}"])
        return start_model(config, base.tokenizer, base, fresh=True).eval()

    assert torch.equal(logits(start(), IDS), logits(build.load_run(home / "lora").model, IDS))
    with pytest.raises(UserError, match=rf"^{folder}: lora_alpha is .*; this adapter has 7$"):
        start("adapter.alpha=7")
    state = load_file(folder / WEIGHTS)
    save_file({key.replace("model.layers.0", "model.layers.9"): tensor for key, tensor in state.items()}, folder / WEIGHTS)
    with pytest.raises(UserError, match=rf"^{folder}: holds 'model.layers.*which this model has no place for"):
        start()


def test_every_expert_is_a_lora_of_its_own_and_routing_says_when(home, export, tmp_path):
    code, err = export("modes")
    assert code == 0, err
    folder = tmp_path / "hf" / "adapters"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "routing.json"]
    routing = json.loads((folder / "routing.json").read_text())
    assert routing == {"copy": None, "sort": "a", "reverse": "b", "rotate": "a"}
    run = build.load_run(home / "modes")
    base = logits(build.load_run(tmp_path / "hf", cache_dir=tmp_path / "cache").model, IDS)
    for mode, expert in routing.items():
        task_ids(run.model).set(mode)
        found = logits(run.model, IDS)
        assert close(found, base if expert is None else theirs(tmp_path / "hf", expert)), mode
        assert bool(close(found, base)) is (expert is None)


def test_one_mode_alone(export, tmp_path):
    code, err = export("modes", "adapter.task=reverse")
    assert code == 0, err
    assert json.loads((tmp_path / "hf" / "adapters" / "routing.json").read_text()) == {"reverse": "b"}
    assert not (tmp_path / "hf" / "adapters" / "a").exists()


def test_a_mode_without_an_expert_has_nothing_to_keep(export, tmp_path):
    code, err = export("modes", "adapter.task=copy")
    assert code == 2 and "task.adapter: keep, but copy is the base model itself" in err and not (tmp_path / "hf").exists()


def _other_tensor(config, state):
    next(iter(state.values())).view(-1)[0] += 1


def _other_scale(config, state):
    config["lora_alpha"] *= 2


def _other_modules(config, state):
    config["target_modules"] = config["target_modules"][1:]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(_other_tensor, "did not survive"), (_other_scale, "logits differ after reading it back"), (_other_modules, "means other modules")],
)
def test_what_was_written_wrongly_never_appears(export, tmp_path, monkeypatch, spoil, words):
    """The adapters are read back: a defect in the writer leaves no folder."""
    write = interop.write_folder

    def wrongly(folder, config, state):
        config, state = dict(config), {name: tensor.clone() for name, tensor in state.items()}
        if "adapters" in folder.parts:
            spoil(config, state)
        write(folder, config, state)

    monkeypatch.setattr(interop, "write_folder", wrongly)
    code, err = export("lora")
    assert code == 1 and words in err, err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".hf", "hf"))] == []


def test_in_half_precision_a_lost_layer_shows(home, export, tmp_path):
    """The logits of bfloat16 weights are compared in float32: within the rounding of bfloat16 an adapter may come and go."""
    assert export("lora")[0] == 0
    model = build.load_run(home / "lora").model.bfloat16().eval()
    other = copy.deepcopy(model)
    layer = list(adapter_layers(other))[-1][1]
    layer.lora_B.weight.data *= 0.1  # as after the first steps
    dict(model.named_modules())[list(adapter_layers(model))[-1][0]].lora_B.weight.data *= 0.1
    check_close(probe(widened(model)), probe(widened(other)), tmp_path)
    layer.lora_B.weight.data.zero_()
    check_close(probe(model), probe(other), tmp_path)
    with pytest.raises(RuntimeError, match="logits differ"):
        check_close(probe(widened(model)), probe(widened(other)), tmp_path)


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
        ("moe_lora", "MoELoRA is no plain LoRA for each task; nor can it be merged, since it weighs its parts anew for each token"),
        ("biases", "modules_to_save=['norm']"),
        ("none", "trained without an adapter"),
    ],
)
def test_what_is_no_plain_lora(export, tmp_path, name, words):
    code, err = export(name)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: task.adapter: keep, but") and words in lines[0], err
    assert not (tmp_path / "hf").exists() and "Traceback" not in err
