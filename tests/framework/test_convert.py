"""python -m framework.convert, in this process: imports that `ckpt=` loads, exports with the same logits, one line for a mistake."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer as Backend
from tokenizers import models

from components.contracts import RopeRegime, RopeSpec, UserError
from components.data.tokenizers import EOT, SPECIALS, bytes_tokenizer
from components.interop import read
from components.interop.files import write_folder, write_pth
from framework import build, convert
from framework.checkpoint import FOLDER
from framework.runs import newest_run, read_state
from tests.components.interop.models import config, fla_checkpoint, logits, model, reference_checkpoint
from tests.components.interop.oracle import fla_logits, reference_logits

IDS = torch.randint(256, (2, 23), generator=torch.Generator().manual_seed(5))
ROWS = 320  # the bytes, our five special tokens, rounded up


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reference checkpoint, a tokenizer, and the run that they became."""
    folder = tmp_path_factory.mktemp("convert")
    bytes_tokenizer().save(folder / "tokenizer")
    write_pth(folder / "ref.pth", {"model": reference_checkpoint(rows=ROWS), "hparams": {}, "iter_num": 1, "step_count": 1})
    assert command(folder / "ref.pth", "--tokenizer", folder / "tokenizer", "--to", folder / "run", *HEADS) == 0
    return folder


HEADS = ("model.num_heads=4", "model.window=7")


def command(*words):
    return convert.main([str(word) for word in words])


def refused(capsys, *words, says):
    """Exit code 2, one line on stderr that holds `says`, nothing on stdout."""
    capsys.readouterr()
    assert command(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and says in err, err


def test_an_imported_reference_checkpoint_is_a_run_with_its_logits(folder):
    run = build.load_run(folder / "run")
    expected = reference_logits(reference_checkpoint(rows=ROWS), IDS, 4, 7)
    assert (logits(run.model, IDS).double() - expected).norm() <= 1e-5 * expected.norm()
    assert run.step == 0 and run.model.vocab_size == ROWS and run.tokenizer.vocab_size == 261
    assert newest_run(folder, trained=True) == folder / "run"
    state = read_state(folder / "run")
    assert (state["status"], state["choices"]["model"]) == ("imported", "samba")
    build.check(run.cfg)
    assert run.cfg.data.tokenizer.path == str(folder / "run" / "tokenizer")


@pytest.mark.parametrize("layout", ["samba", "fla"])
def test_a_run_goes_out_and_comes_back_bit_for_bit(folder, layout, capsys):
    out, back = folder / f"out_{layout}", folder / f"back_{layout}"
    assert command(folder / "run", "--to", out, "--format", layout, "--shard-bytes", 300_000) == 0
    assert command(out, "--to", back, *(HEADS if layout == "samba" else ())) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith(f"{out}: ") and f"python generate.py ckpt={back}" in said[1]
    before, after = (build.load_run(path) for path in (folder / "run", back))
    assert torch.equal(logits(before.model, IDS), logits(after.model, IDS))
    written, own = (json.loads((place / "tokenizer.json").read_text()) for place in (out, folder / "run" / "tokenizer"))
    assert written | {"post_processor": None} == own  # a Hugging Face folder frames texts for those who read it
    w = read(out).tensors
    oracle = (
        reference_logits
        if layout == "samba"
        else lambda w, *args: fla_logits({"lm_head.weight": w["backbone.embeddings.weight"], **w}, *args)
    )
    expected = oracle(w, IDS, 4, 7)
    assert (logits(before.model, IDS).double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
def test_transformers_own_folder_comes_in_and_goes_out(folder):
    transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=261, hidden_size=32, num_hidden_layers=2, state_size=6)
    ).eval()
    theirs.save_pretrained(folder / "mamba")
    bytes_tokenizer().save(folder / "mamba")
    assert command(folder / "mamba", "--to", folder / "mamba_run") == 0
    with torch.no_grad():
        expected = theirs(IDS).logits
    run = build.load_run(folder / "mamba_run")
    assert (logits(run.model, IDS) - expected).norm() <= 1e-5 * expected.norm()
    assert command(folder / "mamba_run", "--to", folder / "mamba_out", "--format", "transformers") == 0
    again = transformers.MambaForCausalLM.from_pretrained(folder / "mamba_out").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)


def test_longrope_comes_in_with_a_folder_of_transformers_and_goes_out(tmp_path, capsys):
    """Both tables and the attention factor of both regimes: logits at, and past, the switch; and the folder written again."""
    transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")
    short, long = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    about = transformers.Phi3Config(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, sliding_window=None, max_position_embeddings=96, original_max_position_embeddings=24, pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": 24,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Phi3ForCausalLM(about).eval()
    theirs.save_pretrained(tmp_path / "hf")
    bytes_tokenizer().save(tmp_path / "hf")
    assert command(tmp_path / "hf", "--to", tmp_path / "run") == 0
    run = build.load_run(tmp_path / "run")
    assert run.model.rope_spec.bounds == (24,) and run.cfg.rope.attention_factor.policy == "both"
    assert command(tmp_path / "run", "--to", tmp_path / "out", "--format", "phi3") == 0
    again = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "out").eval()
    for length in (24, 25, 60):
        ids = torch.arange(length)[None] * 31 % 320
        with torch.no_grad():
            expected = theirs(ids).logits
            assert torch.equal(again(ids).logits, expected)
        assert (logits(run.model, ids) - expected).abs().max() <= 1e-5 * expected.abs().max() + 2e-6


@pytest.mark.slow
def test_an_adapter_is_merged_into_what_is_written(folder):
    """The run directory of a model with LoRA, as training leaves it."""
    run, other = build.load_run(folder / "run"), folder / "lora"
    cfg = OmegaConf.create(OmegaConf.to_container(run.cfg))
    cfg.adapter = build.compose("train", ["model/size=test", "adapter=lora"]).adapter
    build.build(cfg.adapter).apply(run.model)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora" in name.lower():
                parameter.normal_(std=0.05)
    convert.write_run(other, "samba", cfg, run.model.state_dict())
    run.tokenizer.save(other / "tokenizer")
    expected = logits(build.load_run(other).model.eval(), IDS)
    assert (expected - logits(build.load_run(folder / "run").model, IDS)).norm() > 0.01 * expected.norm()
    assert command(other, "--to", folder / "merged", "--format", "fla") == 0
    assert command(folder / "merged", "--to", folder / "merged_run") == 0
    assert (logits(build.load_run(folder / "merged_run").model, IDS) - expected).norm() <= 1e-5 * expected.norm()


def test_rows_are_added_for_special_tokens_that_the_tokenizer_lacks(tmp_path, capsys):
    """The 256 old rows stay; the new ones are the mean row."""
    bytes_tokenizer().save(tmp_path)
    w = fla_checkpoint(rows=256)
    about = {"model_type": "samba", "attn": {"num_heads": 4, "window_size": 7, "rope_theta": 10000.0}}
    write_folder(tmp_path, w, about)
    assert command(tmp_path, "--to", tmp_path / "run") == 0
    assert "64 rows added to the 256" in capsys.readouterr().err
    run = build.load_run(tmp_path / "run")
    expected = fla_logits(w, IDS, 4, 7)
    assert (logits(run.model, IDS)[..., :256].double() - expected).norm() <= 1e-5 * expected.norm()
    for name in ("embed_tokens", "lm_head"):
        weight = run.model.get_parameter(f"{name}.weight")
        assert torch.equal(weight[256:], weight[:256].mean(0).expand(64, -1))


def test_a_foreign_end_of_text_becomes_ours(tmp_path, capsys):
    """Its id stays, so that the embedding row trained for it is the one used."""
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, merges=[], unk_token="<unk>"))
    backend.add_special_tokens(["</s>", "<unk>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_pth(tmp_path / "ref.pth", reference_checkpoint(rows=64))
    assert command(tmp_path / "ref.pth", "--to", tmp_path / "run", *HEADS, "--eot", "</s>") == 0
    tokenizer = build.load_run(tmp_path / "run").tokenizer
    assert tokenizer.eot_id == 2 and tokenizer.vocab_size == 4 + len(SPECIALS) - 1 and tokenizer.encode("ab") == [0, 1]
    assert EOT in json.loads((tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    refused(capsys, tmp_path / "ref.pth", "--to", tmp_path / "x", *HEADS, "--eot", "<s>", says="special tokens </s>, <unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')  # as Hugging Face folders say it
    own = convert.own_tokenizer(tmp_path / "tokenizer.json", None)
    assert own.eot_id == 2 and own.stop_ids[0] == 2


def test_mistakes_of_an_import(folder, tmp_path, capsys):
    ref, to = folder / "ref.pth", ("--to", tmp_path / "new")
    tokenizer = ("--tokenizer", folder / "tokenizer")
    refused(capsys, ref, *to, *tokenizer, says="model.num_heads, model.window: not stored")
    refused(capsys, ref, *to, *HEADS, says="RUN_DIR --tokenizer FILE")
    refused(capsys, ref, *to, *HEADS, "--tokenizer", tmp_path / "none.json", says="none.json")
    refused(capsys, ref, *to, *HEADS, *tokenizer, "--from", "foo", says="'foo' is not one of fla, phi3, samba, transformers")
    refused(capsys, ref, *to, *HEADS, *tokenizer, "--from", "fla", says="backbone.embeddings.weight")
    refused(capsys, ref, *to, *HEADS, *tokenizer, "seed=3", says="only model.KEY=VALUE")
    refused(capsys, ref, *to, *HEADS, *tokenizer, "model.hidden_size=32", says="of other sizes")
    refused(capsys, ref, "--to", folder / "run", *HEADS, *tokenizer, says="is not empty")
    refused(capsys, tmp_path / "none", *to, says="no such file")
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    refused(capsys, tmp_path / "x.pth", *to, says="layout not recognised (first tensor: x)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth"]  # nothing half-done is left


@pytest.mark.slow
def test_an_unknown_key_of_the_model_is_named(folder, tmp_path, capsys):
    words = (*HEADS, "--tokenizer", folder / "tokenizer", "model.windov=3")
    refused(capsys, folder / "ref.pth", "--to", tmp_path / "new", *words, says="did you mean 'model.window'")


def test_mistakes_of_an_export(folder, tmp_path, capsys):
    to = ("--to", tmp_path / "new")
    refused(capsys, folder / "run", *to, "--format", "foo", says="'foo' is not one of")
    refused(capsys, folder / "run", *to, "--format", "transformers", says="cannot be written as transformers")
    refused(capsys, folder / "run", *to, "--format", "fla", *HEADS, says="for imports")
    refused(capsys, tmp_path, *to, "--format", "fla", says="is not a run")
    other = build.compose("train", ["model=phi4mini", "model/size=test", "model/overlay=phi4mini_test"])
    other.model.vocab_size = ROWS
    built = build.build_model(other, 261)
    convert.write_run(tmp_path / "phi", "phi4mini", other, built.state_dict())
    bytes_tokenizer().save(tmp_path / "phi" / "tokenizer")
    refused(capsys, tmp_path / "phi", *to, "--format", "fla", says="components.models.phi4mini.Phi4Mini")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["phi"]


def test_a_rope_rule_has_no_place_in_a_foreign_checkpoint(folder, tmp_path, capsys):
    run = build.load_run(folder / "run")
    run.cfg.rope = build.compose("train", ["model/size=test", "rope=linear"]).rope
    run.cfg.model.window = None  # with a window no rule acts
    convert.write_run(tmp_path / "scaled", "samba", run.cfg, run.model.state_dict())
    run.tokenizer.save(tmp_path / "scaled" / "tokenizer")
    refused(capsys, tmp_path / "scaled", "--to", tmp_path / "x", "--format", "fla", says="no place for the RoPE rule 'linear'")


def test_what_does_not_survive_is_a_defect_and_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    """The comparison is not for show: a layout that swaps two matrices on the way back is caught."""
    layout = convert.layout_named("samba", "")
    numbers = config()
    w = layout.to_foreign(model(numbers).state_dict(), numbers)
    other = w | {"transformer.wte.weight": w["transformer.wte.weight"] + 1}
    with pytest.raises(RuntimeError, match=r"transformer\.wte\.weight did not survive"):
        convert.compare(other, w, "here")

    def forgetful(tensors, numbers):
        return {name: t.flip(0) if name.endswith("o_proj.weight") else t for name, t in original(tensors, numbers).items()}

    original = layout.from_foreign
    broken = type(layout)(**{**vars(layout), "from_foreign": forgetful})
    monkeypatch.setattr(convert, "layout_for", lambda *_: broken)
    assert command(folder / "run", "--to", tmp_path / "x", "--format", "samba") == 1
    assert "the logits differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("factor", "policy"), [(1.0, "none"), (1.25, "both")])
@pytest.mark.parametrize("ends", [(), (64,)])
def test_a_rule_in_words_is_the_rule(factor, policy, ends):
    """The policy of a file, and one table where it has one: composed again, the words give the same RopeSpec."""
    tables = [(1.0, 1.5, 2.0), (1.0, 2.0, 3.0)][-1 - len(ends) :]
    regimes = tuple(RopeRegime(table, factor, end) for table, end in zip(tables, [*ends, None], strict=True))
    spec = RopeSpec(6, 10000.0, regimes, 64, 256, "longrope")
    rope = build.compose("train", ["model=phi4mini", "model/size=test", *convert.rope_words(spec)]).rope
    assert rope.attention_factor.policy == policy and build.build(rope).spec(6, 10000.0, 64) == spec


def test_model_words_are_typed():
    assert convert.given_numbers(["model.window=null", "model.num_heads=4", "model.layer_pattern=[mamba]"]) == {
        "window": None, "num_heads": 4, "layer_pattern": ["mamba"],
    }  # fmt: skip
    with pytest.raises(UserError, match=r"only model\.KEY=VALUE"):
        convert.given_numbers(["model"])


def test_the_checkpoint_of_an_import_is_a_checkpoint(folder):
    content = torch.load(folder / "run" / FOLDER / "step000000.ckpt", weights_only=True)
    assert content["global_step"] == 0 and all(name.startswith("model.") for name in content["state_dict"])
