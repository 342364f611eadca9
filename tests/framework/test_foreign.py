"""`ckpt=HF_DIR`: a Hugging Face folder is a run, for generate.py, train.py and load_run; what is wrong with one is said in one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import train
from components.contracts import Batch, SamplingParams, UserError
from components.data.tokenizers import bytes_tokenizer
from framework import build, convert, foreign
from framework.engines.native import NativeEngine
from framework.export import export, layout_for
from framework.runs import read_state, with_inherited
from tests.components.interop.models import logits
from tests.framework.interchange import phi_run, said

IDS = torch.arange(60)[None] * 31 % 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What task=export writes of a chat run that follows transformers' attention factor."""
    home = tmp_path_factory.mktemp("foreign")
    run = build.load_run(phi_run(home / "run", "rope.attention_factor={policy: both, value: 1.25}", "data=chat", "data.path=x", "task=sft"))
    export(run, home / "hf", layout_for(run, None, "transformers", ""), "transformers", None, "")
    return home / "hf"


@pytest.fixture
def own(folder, tmp_path):
    """A copy to spoil."""
    shutil.copytree(folder, tmp_path / "hf")
    return tmp_path / "hf"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_it_becomes_a_run_once(folder, tmp_path, capsys):
    """Same logits on both sides of the switch, same policy, conversations as before; the second time it is found."""
    run = build.load_run(said(folder, tmp_path))
    assert "converting it into" in capsys.readouterr().err
    first = build.load_run(folder.parent / "run")
    for length in (24, 60):
        assert torch.equal(logits(run.model, IDS[:, :length]), logits(first.model, IDS[:, :length]))
    assert run.model.rope_spec == first.model.rope_spec
    assert run.cfg.rope.attention_factor == {"policy": "both", "value": 1.25} and run.cfg.data._target_ == first.cfg.data._target_
    assert said(folder, tmp_path) == run.path and capsys.readouterr().err == ""  # said once a process
    foreign._announced.clear()
    assert said(folder, tmp_path) == run.path and "converted before" in capsys.readouterr().err
    assert read_state(run.path)["choices"] == {"model": "phi4mini", "model/size": "imported", "rope": "longrope"}
    chosen = with_inherited({"model": "samba", "model/size": "tiny", "data": "text"}, str(folder), tmp_path)
    assert chosen == {"model": "hf", "model/size": "none", "data": "text"}  # the name of a run that starts from it


def test_load_run_of_python(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build.load_run(folder).path.parent == foreign.CACHE / "imported" and (tmp_path / ".cache").is_dir()


def test_a_folder_that_changed_is_read_anew(own, tmp_path):
    first = said(own, tmp_path)
    assert said(own, tmp_path) == first
    weights = load_file(own / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, own / "model.safetensors", metadata={"format": "pt"})
    second = said(own, tmp_path)
    edit(own / "config.json", rms_norm_eps=1e-3)
    assert len({first, second, said(own, tmp_path)}) == 3


@pytest.mark.parametrize("error", [OSError(39, "Directory not empty"), UserError("exists and is not empty")])
def test_two_processes_may_convert_it_at_once(folder, tmp_path, monkeypatch, error):
    """The slower one finds a run in its place, and takes it."""

    def slower(*words):
        first(*words)
        raise error

    first = convert.import_checkpoint
    monkeypatch.setattr(convert, "import_checkpoint", slower)
    assert build.load_run(said(folder, tmp_path)).step == 0


def test_train_goes_on_from_it(folder, tmp_path, capfd):
    """Three steps on another text, with its tokenizer; the checkpoint generates."""
    (tmp_path / "text.txt").write_text("".join(f"Line {n} of the text, with {n * n} things.\n" for n in range(300)))
    words = [f"ckpt={folder}", "data=text", f"data.path={tmp_path / 'text.txt'}", "data.seq_len=32", "trainer.max_steps=3", "logger=none"]
    places = [f"paths.root={tmp_path / 'outputs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    assert train.main([*words, *places, "trainer.precision=32-true"]) == 0
    (run,) = (tmp_path / "outputs" / "default").iterdir()
    assert "_hf-" in run.name and read_state(run)["choices"]["model"] == "phi4mini"
    loaded = build.load_run(run)
    assert loaded.step == 3 and loaded.model.rope_spec.bounds == (24,)
    assert loaded.cfg.ckpt == str(folder)
    state = json.loads((run / "run_state.json").read_text()) | {"status": "interrupted"}
    (run / "run_state.json").write_text(json.dumps(state))  # stopped before its first checkpoint, and the cache was cleared
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(tmp_path / "cache" / "imported")
    assert train.main([f"resume={run}"]) == 0
    again = build.load_run(run)
    assert again.step == 3 and torch.equal(again.model.head_weight, loaded.model.head_weight)
    assert "Traceback" not in capfd.readouterr().err


def refused(folder, tmp_path, capfd, *words):
    """One error line that holds `words`; nothing is left in the cache."""
    capfd.readouterr()
    places = [f"paths.root={tmp_path / 'outputs'}", f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'out'}"]
    assert generate.main([*places, f"ckpt={folder}", "prompt=a"]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("ckpt=")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ckpt: "), err
    assert all(word in lines[0] for word in words), lines[0]
    assert not list((tmp_path / "cache").glob("imported/*"))


def test_every_damage_is_one_line(folder, own, tmp_path, capfd):
    def spoiled(name, change):
        shutil.copy(folder / name, own / name)
        change(own / name)

    (own / "tokenizer.json").unlink()
    refused(own, tmp_path, capfd, "no tokenizer.json beside it", f"python -m framework.convert {own} --to RUN_DIR --tokenizer FILE")
    shutil.copy(folder / "tokenizer.json", own)
    spoiled("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:1000]))
    refused(own, tmp_path, capfd, "model.safetensors: cannot be read: truncated, damaged")
    weights = load_file(folder / "model.safetensors")
    wrong = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    save_file(wrong | {"extra.one": torch.zeros(1), "extra.two": torch.zeros(1)}, own / "model.safetensors")
    refused(own, tmp_path, capfd, "unknown tensors: extra.one, extra.two", "missing tensors: model.norm.weight")
    save_file({"transformer.h.0.attn.c_attn.weight": torch.zeros(2, 2)}, own / "model.safetensors")
    refused(own, tmp_path, capfd, "layout not recognised (first tensor: transformer.h.0", "--from fla|phi3|samba|transformers")
    shutil.copy(folder / "model.safetensors", own)
    edit(own / "config.json", model_type="llama")
    refused(own, tmp_path, capfd, "model_type='llama'", "'phi3'")
    (own / "config.json").write_text("{")
    refused(own, tmp_path, capfd, "config.json: cannot be read as JSON")
    refused(tmp_path, tmp_path, capfd, "is not a run", "a Hugging Face folder config.json")


def test_code_in_a_folder_is_not_run(own, tmp_path, capsys):
    (own / "modeling.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    edit(own / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"}, trust_remote_code=True)
    build.load_run(said(own, tmp_path))
    assert "names code of its own (auto_map), which is never run" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_generation_stops_at_every_id_that_the_folder_names(own, tmp_path):
    """Phi-4-Mini has two; here a third, of a plain token. It outlives training from it, and comes out again with an export."""
    asked = [256, *b"Line"]
    said_first = NativeEngine(*parts(own, tmp_path)).generate([asked], SamplingParams(max_new_tokens=8, temperature=0))[0].token_ids
    edit(own / "generation_config.json", eos_token_id=[256, 260, said_first[3]])
    model, tokenizer = parts(own, tmp_path)
    assert tokenizer.stop_ids == (256, 260, said_first[3])
    stopped = NativeEngine(model, tokenizer).generate([asked], SamplingParams(max_new_tokens=8, temperature=0))[0]
    assert stopped.finish_reason == "stop" and stopped.token_ids == said_first[: said_first.index(said_first[3]) + 1]
    run = build.load_run(said(own, tmp_path))
    export(run, tmp_path / "again", layout_for(run, None, "transformers", ""), "transformers", None, "")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == [256, 260, said_first[3]]


def parts(folder, tmp_path):
    run = build.load_run(said(folder, tmp_path))
    return run.model, run.tokenizer


def test_rows_of_the_padding_are_never_said(own, tmp_path):
    """The embedding of ids that no text has made the likeliest by far: neither greedy nor sampled answers hold one."""
    weights = load_file(own / "model.safetensors")
    model, tokenizer = parts(own, tmp_path)
    with torch.no_grad():
        wanted = model(Batch(torch.tensor([[256, 1, 2]]))).hidden[0, -1]
    weights["model.embed_tokens.weight"][262:] = 50 * wanted
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = parts(own, tmp_path)
    assert tokenizer.vocab_size == bytes_tokenizer().vocab_size == 261 and model.vocab_size == 320
    assert logits(model, torch.tensor([[256, 1, 2]]))[0, -1].argmax() >= 262
    for temperature in (0.0, 1.0, 5.0):
        params = SamplingParams(max_new_tokens=20, temperature=temperature)
        for answer in NativeEngine(model, tokenizer).generate([[256, 1, 2], [256, 9]], params):
            assert max(answer.token_ids) < 261 and not {257, 258, 259} & set(answer.token_ids)
            assert all(torch.tensor(answer.logprobs).isfinite())


def test_what_no_import_reads_changes_nothing_and_leftovers_of_the_dead_go(own, tmp_path):
    first = said(own, tmp_path)
    (own / "README.md").write_text("About these weights.\n")
    (own / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert said(own, tmp_path) == first
    shutil.rmtree(first)
    dead, living = (first.parent / f".{first.name}.{pid}.tmp" for pid in (2**22 + 1, os.getppid()))  # above the kernel's limit
    dead.mkdir()
    living.mkdir()
    assert said(own, tmp_path) == first and living.is_dir() and not dead.exists()
