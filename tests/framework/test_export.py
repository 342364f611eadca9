"""task=export from generate.py down: what transformers makes of the folder, what cannot be written, and the way back as `ckpt=`."""

import json

import pytest
import torch

import generate
from components.contracts import SamplingParams, UserError
from components.data.tokenizers import bytes_tokenizer
from components.rope.dynamic import Dynamic
from framework import build
from framework.engines.native import NativeEngine
from framework.entry import as_text
from framework.export import Export, layout_for
from framework.export import export as write
from framework.generate import run_renderer
from tests.components.interop.models import logits
from tests.framework.interchange import LONG, SHORT, phi_run, said

IDS = {length: torch.arange(length)[None] * 31 % 256 for length in (24, 25, 60)}
CHAT = ("data=chat", "data.path=none.jsonl", "task=sft")
BOTH = "rope.attention_factor={policy: both, value: null}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on text, and one on conversations; rows of up to 24 tokens turn by one table, longer ones by another."""
    home = tmp_path_factory.mktemp("export")
    phi_run(home / "text", "rope.attention_factor={policy: long_only, value: 1.3}")
    phi_run(home / "chat", BOTH, *CHAT)
    phi_run(home / "window", "rope=none", "model.window=7")
    return home


@pytest.fixture
def export(runs, tmp_path, capfd):
    """export(run, words...) -> (exit code, stdout, stderr); the folder is tmp_path / "hf"."""

    def run_it(name, *words):
        places = [f"paths.root={runs}", f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'out'}"]
        code = generate.main([*places, "task=export", f"ckpt={runs / name}", f"task.to={tmp_path / 'hf'}", *words])
        out, err = capfd.readouterr()
        return code, out, err

    return run_it


def refused(run, to, *words, format=None, engine="transformers"):
    """One line that holds `words`, and nothing written."""
    with pytest.raises(UserError) as caught:
        write(run, to, layout_for(run, format, engine, "task.format"), engine, None, "task.to")
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert not to.exists() or [path.name for path in to.iterdir()] == ["mine"]


def read_json(folder, name):
    return json.loads((folder / name).read_text())


def test_transformers_reads_a_folder_with_two_tables(runs, export, tmp_path):
    """Logits up to the switch, one beyond, and far beyond; ids of a text, of a conversation; greedy answers."""
    transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")
    code, out, err = export("chat")
    assert code == 0 and "read back with equal logits" in out and f"ckpt={tmp_path / 'hf'}" in out and "whole batch" in err, err
    folder = tmp_path / "hf"
    names = "chat_template.jinja config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in folder.iterdir()) == names.split()
    about, config = read_json(folder, "generation_config.json"), read_json(folder, "config.json")
    assert about["eos_token_id"] == config["eos_token_id"] == [256, 260] and about["pad_token_id"] == about["bos_token_id"] == 256
    assert about["suppress_tokens"] == [257, 258, 259, *range(261, 320)] and config["vocab_size"] == 320
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    run = build.load_run(runs / "chat")
    for ids in IDS.values():
        with torch.no_grad():
            expected = theirs(ids).logits
        assert (logits(run.model, ids) - expected).abs().max() <= 1e-5 * expected.abs().max() + 2e-6
    data = build.build_data(run.cfg)
    data.tokenizer = run.tokenizer
    chat = [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Why {{x}}?"}, {"role": "assistant", "content": "é"}]
    for turns in (chat[:2], [*chat, chat[1]]):
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids == data.render(turns)
    assert tokenizer("def é").input_ids == [run.tokenizer.eot_id, *run.tokenizer.encode("def é")]
    assert tokenizer.decode(tokenizer("def é").input_ids, skip_special_tokens=True) == "def é"
    ids = data.render(chat[:2])
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    ours = NativeEngine(run.model, run.tokenizer).generate([ids], SamplingParams(max_new_tokens=40, temperature=0))[0]
    assert answer == ours.token_ids  # across the switch, stop ids and ids that are never said included


FORM = 'Say "{instruction}"\n{% \\{{ }} \\n é \U0001f600 \'#}\n\n### {instruction}:\n'


def test_the_prompt_of_an_instruction_goes_along(runs, export, tmp_path):
    """transformers' chat template and our own way back ask with the ids that the run asks with; other conversations are refused."""
    transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")
    form = ["data=multitask", "data.tasks={a: {path: gone.json}}", f"data.template.without_input={as_text(FORM)}"]
    phi_run(runs / "instructed", "rope=none", *form)
    code, _, err = export("instructed")
    assert code == 0 and "prompts: chat_template.jinja words what a user says as the run does" in err, err
    run, again = build.load_run(runs / "instructed"), build.load_run(said(tmp_path / "hf", tmp_path))
    assert run.cfg.data.template.without_input == FORM
    asked = run_renderer(run)("Why {{x}} {instruction}?")
    assert asked == [256, *FORM.replace("{instruction}", "Why {{x}} {instruction}?").encode()]
    assert run_renderer(again)("Why {{x}} {instruction}?") == asked
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    turn = {"role": "user", "content": "Why {{x}} {instruction}?"}
    assert tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=False) == asked
    with pytest.raises(Exception, match="one message of the user"):
        tokenizer.apply_chat_template([turn, turn])


CELLS = [("transformers", "always_long", 1.3, LONG), ("vllm", "always_short", 1.0, SHORT)]


@pytest.mark.parametrize(("engine", "switch", "factor", "table"), CELLS)
def test_one_regime_can_always_be_written(runs, export, tmp_path, engine, switch, factor, table):
    code, _, err = export("text", f"rope.switch={switch}", f"task.engine={engine}")
    assert code == 0 and err == "", err
    rule = read_json(tmp_path / "hf", "config.json")["rope_scaling"]
    assert rule["short_factor"] == rule["long_factor"] == table and rule["attention_factor"] == factor
    assert [rule.get(key) for key in ("short_mscale", "long_mscale")] == ([factor] * 2 if engine == "vllm" else [None] * 2)
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    run, again = build.load_run(runs / "text"), build.load_run(said(tmp_path / "hf", tmp_path))
    run.model.set_rope(run.model.rope_spec.switched(switch))
    for ids in IDS.values():
        assert torch.equal(logits(run.model, ids), logits(again.model, ids))
    assert again.model.rope_spec.bounds == () and again.cfg.rope.switch == "always_long"


def test_what_cannot_be_written_names_the_way_out(runs, export, tmp_path):
    ways, to = ("rope.switch=always_long", "rope.switch=always_short"), tmp_path / "hf"
    text, chat, window = (build.load_run(runs / name) for name in ("text", "chat", "window"))
    code, out, err = export("text")
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: rope: longrope has attention factors"), err
    refused(text, to, "attention factors [1.0, 1.3]", "one for rows of any length", *ways)
    refused(chat, to, "vLLM never does", "max_model_len > 24", *ways, engine="vllm")
    refused(window, to, "model.window: 7 cannot be written as vLLM's Phi3ForCausalLM, which knows no sliding", engine="vllm")
    refused(chat, to, "task.format: fla does not hold", "allowed: phi3", format="fla")
    refused(chat, to, "'foo' is not one of", format="foo")
    chat.model.set_rope(Dynamic(factor=4.0, target_len=None).spec(12, 10000.0, 24))
    refused(chat, to, "changes tables at [24, 48, 72] tokens", *ways)
    with pytest.raises(UserError, match=r"task\.shard_bytes: 0"):
        Export(None, None, "vllm", 0, "merge")
    to.mkdir()
    (to / "mine").touch()
    refused(window, to, "task.to:", "is not empty")


@pytest.mark.slow
def test_another_rule_and_shards(runs, export, tmp_path):
    """`rope=` of generate.yaml: what is written is what would decode."""
    assert export("window", "rope=yarn", "rope.factor=4", "task.shard_bytes=100000")[0] == 0
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    expected = build.load_run(runs / "window", {"rope": build.compose("train", ["rope=yarn", "rope.factor=4"]).rope})
    again = build.load_run(said(tmp_path / "hf", tmp_path))
    assert again.model.rope_spec.regimes == expected.model.rope_spec.regimes
    for ids in IDS.values():
        assert torch.equal(logits(expected.model, ids), logits(again.model, ids))


def test_a_model_without_a_class_there_is_sent_to_its_own_layouts(tmp_path):
    """Samba is nobody's but its authors' and flash-linear-attention's; a stack of Mamba alone is transformers' too."""
    runs = {}
    for variant in ("base", "mamba_only"):
        config = build.compose("train", ["model=samba", "model/size=test", f"model/variant={variant}"])
        model = build.build_model(config, 261)
        config.model.vocab_size = model.vocab_size
        runs[variant] = build.Run(config, model, bytes_tokenizer(), tmp_path / variant, 0)
    refused(runs["base"], tmp_path / "hf", "model.layer_pattern", "has Mamba mixers alone", "task.format=fla, task.format=samba")
    fits = "has no class for a components.models.samba.Samba; write it for other code with task.format=fla or task.format=samba"
    refused(runs["base"], tmp_path / "hf", "task.engine: vllm", fits, engine="vllm")
    write(runs["mamba_only"], tmp_path / "hf", layout_for(runs["mamba_only"], None, "transformers", ""), "transformers", None, "task.to")
    about = read_json(tmp_path / "hf", "generation_config.json")
    assert read_json(tmp_path / "hf", "config.json")["model_type"] == "mamba" and about["eos_token_id"] == [256, 260]
