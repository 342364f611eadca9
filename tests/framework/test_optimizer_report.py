"""The state report: any size on any machine, the configured optimizer's own figures, mistakes in one line."""

import pytest

from framework import optimizer_report
from framework.build import compose

PHI = ["model=phi4mini", "model/size=3b8"]
SMALL = ["model=phi4mini", "model/size=test", "model.vocab_size=2048"]


def figures(text: str) -> tuple[int, int, dict[str, float]]:
    """Tensors and bytes of the sum line, and GiB (MiB) of each rule."""
    parameters, rules = text.split("\n\n")
    last = parameters.splitlines()[-1].split()
    table = {line.split()[0].lstrip("~"): float(line.split()[1]) for line in rules.splitlines()[2:]}
    return int(last[1]), int(last[-1].replace(",", "")), table


def test_a_model_of_any_size_needs_no_memory(capsys):
    model = optimizer_report.build_on_meta(compose("train", PHI))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert optimizer_report.main([*PHI, "optimizer=soap"]) == 0
    out = capsys.readouterr().out
    tensors, total, rules = figures(out)
    assert tensors == 194 and round((total - 4 * tensors) / 2**30, 3) == rules["soap"]
    assert (rules["adamw"], rules["muon"]) == (28.581, 16.581)  # arXiv 2502.17410's sizes: 8 and 4 bytes a matrix element
    down = next(line for line in out.splitlines() if line.startswith("layers.*.mlp.down_proj.weight (x32)"))
    assert down.split()[2:6] == ["3072", "x", "8192", "soap"]


def test_rank_and_roles_are_the_configured_ones(capsys):
    totals = {}
    for words in ([], ["optimizer.rank=16"], ["optimizer.matrix_roles=[down]"]):
        assert optimizer_report.main([*SMALL, "optimizer=cosmos", "optimizer.rank=4", *words]) == 0
        totals[tuple(words)] = figures(capsys.readouterr().out)[2]["cosmos"]
    plain, wider, fewer = totals.values()
    assert plain < wider < fewer


def test_only_what_is_trainable_counts(capsys):
    assert optimizer_report.main([*SMALL, "adapter=lora", "optimizer=adamw"]) == 0
    out = capsys.readouterr().out
    assert "lora_A" in out and "embed_tokens" not in out and figures(out)[0] == 2 * 4 * int(compose("train", SMALL).model.num_layers)


def test_the_vocabulary_may_follow_the_data(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(300)))
    words = ["data=text", f"data.path={tmp_path / 'text.txt'}", "data.tokenizer.kind=bytes", "data.seq_len=32", "data.batch_size=2"]
    assert optimizer_report.main(["model/size=test", f"paths.cache_dir={tmp_path / 'cache'}", *words]) == 0
    embedding = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("embed_tokens.weight"))
    assert embedding.split()[1] == "320"  # 256 bytes and the special ids, to the next multiple of 64


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optimizer.lr=fast"], "error: optimizer.lr: "),
        (["optimizer=cosmos", "optimizer.rank=0"], "error: optimizer.rank: 0; must be a whole number >= 1"),
        (["+optimizer.overrides.nothing={lr:0.1}"], "error: optimizer.overrides: 'nothing' matches no trainable parameter"),
        (["ckpt=outputs/x"], "error: ckpt: 'outputs/x' names a run, and this is of a configuration"),
        (["resume=auto"], "error: resume: 'auto' names a run"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, line, capsys):
    assert optimizer_report.main([*SMALL, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(line) and captured.err.count("\n") == 1 and not captured.out
