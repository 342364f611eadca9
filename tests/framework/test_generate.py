"""generate.py from its entry point down, on a run directory with an untrained model: what is printed, written and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import generate as entry_point
from components.contracts import Batch, Completion, UserError
from components.data.tokenizers import bytes_tokenizer
from framework.build import build, build_model, compose, load_run
from framework.engines.native import NativeEngine
from framework.generate import ANSWER_TOKENS, completions, device
from framework.prompts import read_requests
from framework.runs import write_state

TEXT = "".join(f"The {n}th line says {n * n} things about cats, dogs and the sea.\n" for n in range(400))


def make_run(folder: Path, *words: str, created: str = "2026-01-01T00:00:00", seed: int = 0) -> Path:
    """A run directory as training leaves it, but with initial weights."""
    config = compose("train", ["model/size=test", f"paths.output_dir={folder}", *words])
    tokenizer = bytes_tokenizer()
    torch.manual_seed(seed)
    model = build_model(config, tokenizer.vocab_size)
    build(config.adapter).apply(model)
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    tokenizer.save(folder / "tokenizer")
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "global_step": 7}, folder / "checkpoints" / "step000007.ckpt")
    write_state(folder, created=created, status="done", step=7, last_checkpoint="step000007.ckpt", seed=1)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def text_words(home) -> list[str]:
    return ["data=text", f"data.path={home / 'text.txt'}", "data.tokenizer.kind=bytes", "data.seq_len=64"]


@pytest.fixture(scope="module")
def run(home, text_words) -> Path:
    return make_run(home / "outputs" / "one", *text_words)


@pytest.fixture
def call(home, run, tmp_path, capfd):
    """generate.main(words) in the home; returns (exit code, stdout, stderr)."""

    def run_it(*words: str) -> tuple[int, str, str]:
        places = [f"paths.root={home / 'outputs'}", f"paths.cache_dir={home / 'cache'}", f"hydra.run.dir={tmp_path / 'out'}"]
        code = entry_point.main([*places, "max_new_tokens=12", *words])
        out, err = capfd.readouterr()
        return code, out, err

    return run_it


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one error line that holds `words`, no traceback."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]


def prompts_file(tmp_path: Path, *rows: dict) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompt_is_streamed_and_followed_by_one_line(call, run):
    code, out, err = call("prompt='The 3th'", "decode=greedy")
    assert code == 0, err
    loaded = load_run(run)
    ids = [loaded.tokenizer.eot_id, *loaded.tokenizer.encode("The 3th")]
    for _ in range(12):  # greedy by uncached forwards
        with torch.no_grad():
            logits = loaded.model.logits(loaded.model(Batch(torch.tensor([ids]))).hidden[0, -1])
        logits[loaded.tokenizer.vocab_size :] = -torch.inf
        logits[[loaded.tokenizer.special_id(f"<|{role}|>") for role in ("system", "user", "assistant")]] = -torch.inf
        ids.append(logits.argmax().item())
        if ids[-1] in (loaded.tokenizer.eot_id, loaded.tokenizer.special_id("<|end|>")):
            break
    assert out == loaded.tokenizer.decode(ids[1:]) + "\n"
    (line,) = err.splitlines()
    assert "tokens/s" in line and str(run) in line and "step 7" in line and "python generate.py" in line


def test_prompts_that_are_too_long(call, tmp_path):
    file = prompts_file(tmp_path, {"prompt": "The 3th"}, {"prompt": "The cat sat on the mat and " * 20}, {"prompt": "The"})
    limit = "engine.context_length=40"
    refused(call(f"prompts={file}", f"output={tmp_path / 'a.jsonl'}", limit), "too_long: prompt 1:", "more than the 40", "too_long=skip")
    refused(call(f"prompts={file}", limit, "too_long=truncate"), "too_long: 'truncate' is not one of error, truncate_left, skip; did you")
    refused(call("task=rollouts", limit, "too_long=skip"), "too_long: 'skip'; this task does not look at it")
    for policy in ("skip", "truncate_left"):
        out = tmp_path / f"{policy}.jsonl"
        code, _, err = call(f"prompts={file}", f"output={out}", limit, f"too_long={policy}")
        first, long, last = map(json.loads, out.read_text().splitlines())
        assert code == 0 and first["prompt_cut"] == last["prompt_cut"] == 0 and "error" not in first, err
        if policy == "skip":
            assert (long["finish_reason"], long["text"], long["logprob"]) == ("skipped", "", None) and "more than the 40" in long["error"]
            assert "2 answers in" in err and "prompts too long for the engine: 1 skipped" in err
        else:
            assert long["prompt_cut"] > 0 and long["tokens"] and "error" not in long
            assert "3 answers in" in err and "prompts too long for the engine: 1 cut on the left" in err
    code, out, err = call("prompt='" + "The cat sat on the mat and " * 20 + "'", limit, "too_long=truncate_left")
    assert code == 0 and "1 cut on the left" in err


def test_seed_decides_and_greedy_has_none(call):
    texts = {seed: call("prompt=a", f"seed={seed}")[1] for seed in (1, 2)}
    assert texts[1] == call("prompt=a", "seed=1")[1] != texts[2]
    assert call("prompt=a", "seed=1", "decode=greedy")[1] == call("prompt=a", "seed=2", "decode=greedy")[1]


def test_without_a_prompt_it_goes_on_with_held_out_text(call):
    code, out, err = call()
    assert code == 0, err
    assert "no prompt given" in err and "held-out" in err
    assert out[:10] in TEXT


def test_the_runs_own_sample_prompt_comes_first(call, home, text_words):
    folder = make_run(home / "elsewhere" / "own", *text_words, "samples.prompt='cats and'")
    code, out, err = call(f"ckpt={folder}")
    assert code == 0 and out.startswith("cats and") and "samples.prompt" in err


def test_a_run_whose_data_is_gone_still_generates(call, home, text_words):
    other = home / "gone.txt"
    other.write_text(TEXT)
    folder = make_run(home / "elsewhere" / "gone", *text_words, f"data.path={other}")
    other.unlink()
    code, _, err = call(f"ckpt={folder}")
    assert code == 0 and "document start" in err and "gone.txt" in err


def test_n_answers_on_the_terminal(call):
    code, out, err = call("prompt=a", "n=3")
    assert code == 0 and "--- 3 of 3" in err
    assert len(set(out.splitlines())) > 1


def test_newest_run_is_taken_and_last_best_and_file_name_it_too(call, home, run, text_words):
    newer = make_run(home / "outputs" / "newer", *text_words, created="2026-02-02T00:00:00", seed=3)
    try:
        write_state(newer, best_checkpoint="step000007.ckpt")
        words = ("prompt=a", "decode=greedy")
        expected = call(*words, f"ckpt={newer}")
        for choice in ([], ["ckpt=last"], ["ckpt=best"], [f"ckpt={newer / 'checkpoints' / 'step000007.ckpt'}"]):
            code, out, err = call(*words, *choice)
            assert (code, out) == expected[:2] and str(newer) in err
        assert str(run) in call(*words, f"ckpt={run}")[2]
    finally:
        (newer / "run_state.json").unlink()


def test_prompts_file_becomes_jsonl_in_its_order(call, run, tmp_path):
    rows = [{"prompt": "b" * length, "id": f"row {length}"} for length in (30, 1, 12)] + [{"prompt": ""}, {"prompt": 'é "quoted"\nline'}]
    code, _, err = call(f"prompts={prompts_file(tmp_path, *rows)}", "engine.max_batch=2", "n=2")
    assert code == 0, err
    path = tmp_path / "out" / "generations.jsonl"
    assert str(path) in err and "10 answers" in err
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [(i, k) for i in ("row 30", "row 1", "row 12", 3, 4) for k in (0, 1)]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows for _ in (0, 1)]
    loaded = load_run(run)
    for line in lines:
        assert line["tokens"] == len(line["token_ids"]) <= 12 and line["seconds"] > 0
        assert line["finish_reason"] == ("length" if line["tokens"] == 12 else "stop")
        prompt = [loaded.tokenizer.eot_id, *loaded.tokenizer.encode(line["prompt"])]
        with torch.no_grad():
            logits = loaded.model.logits(loaded.model(Batch(torch.tensor([prompt + line["token_ids"]]))).hidden[0])
        scores = logits.double().log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(line["token_ids"])[:, None])
        assert line["logprob"] == pytest.approx(scores.sum().item(), rel=1e-4)  # float32 sums of up to 12 values of about 6
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tokens"] == sum(line["tokens"] for line in lines) and metrics["answers"] == 10 and metrics["perf/tokens_per_second"] > 0


def test_output_is_where_it_was_asked_for_and_never_overwritten(call, tmp_path):
    words = (f"prompts={prompts_file(tmp_path, {'prompt': 'a'})}", f"output={tmp_path / 'deep' / 'answers.jsonl'}")
    assert call(*words)[0] == 0
    before = (tmp_path / "deep" / "answers.jsonl").read_text()
    assert len(before.splitlines()) == 1
    refused(call(*words), "output", "answers.jsonl", "content already")
    assert (tmp_path / "deep" / "answers.jsonl").read_text() == before


def test_each_answer_is_on_disk_before_the_next_is_done(tmp_path, monkeypatch, call):
    """Killed after the second of three answers, the first two stand in the file."""
    real = NativeEngine.completions

    def dies(self, prompts, params):
        for count, item in enumerate(real(self, prompts, params)):
            if count == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(NativeEngine, "completions", dies)
    code, _, _ = call(f"prompts={prompts_file(tmp_path, *({'prompt': c} for c in 'abc'))}", "engine.max_batch=1", "decode=greedy")
    assert code == 130
    assert [json.loads(line)["prompt"] for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()] == ["a", "b"]


def test_engines_that_only_generate_are_enough():
    class Plain:
        def generate(self, prompts, params):
            return [Completion([1], "x", [0.0], "stop") for _ in prompts]

    assert [index for index, _ in completions(Plain(), [[1], [2]], None)] == [0, 1]


def test_a_run_on_conversations_reads_prompts_as_turns(call, home, tmp_path):
    chats = home / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]}
    chats.write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(60)))
    words = ["task=sft", "data=chat", f"data.path={chats}", "data.tokenizer.kind=bytes", "data.seq_len=64"]
    folder = make_run(home / "elsewhere" / "chat", *words)
    turn = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "hi"}, {"messages": turn}, {"messages": [{"role": "system", "content": "Be brief."}, *turn]}]
    code, _, err = call(f"ckpt={folder}", f"prompts={prompts_file(tmp_path, *rows)}", "decode=greedy")
    assert code == 0, err
    answers = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    loaded = load_run(folder)
    mark = loaded.tokenizer.special_id
    ids = [loaded.tokenizer.eot_id, mark("<|user|>"), *b"hi", mark("<|end|>"), mark("<|assistant|>"), *answers[0]["token_ids"]]
    (scores,) = NativeEngine(loaded.model, loaded.tokenizer).score([ids])
    assert answers[0]["logprob"] == pytest.approx(scores[-answers[0]["tokens"] :].sum().item(), rel=1e-4)  # float32
    assert answers[2]["logprob"] != answers[1]["logprob"]
    code, out, err = call(f"ckpt={folder}")
    assert code == 0 and out.startswith("What is it?") and "held-out" in err
    assert not call(f"ckpt={folder}", "prompt=hi")[1].startswith("hi")
    wizard = prompts_file(tmp_path, {"messages": [{"role": "wizard", "content": "x"}]})
    refused(call(f"ckpt={folder}", f"prompts={wizard}", f"output={tmp_path / 'none.jsonl'}"), "prompts.jsonl: line 1", "wizard")


def test_rope_of_the_run_can_be_changed(call, home, text_words, tmp_path):
    folder = make_run(home / "elsewhere" / "rotary", *text_words, "model=phi4mini")
    prompts = prompts_file(tmp_path, {"prompt": "The sea says many things about"})

    def logprob(name: str, *words: str) -> float:
        path = tmp_path / f"{name}.jsonl"
        code, _, err = call(f"ckpt={folder}", f"prompts={prompts}", f"output={path}", "decode=greedy", *words)
        assert code == 0, err
        return json.loads(path.read_text())["logprob"]

    assert logprob("as trained") == logprob("the same", "rope=none") != logprob("another", "rope=linear", "rope.factor=8.0")

    code, _, err = call(f"ckpt={folder}", f"prompts={prompts}", "rope.switch=upfront")
    assert code == 2 and "rope.switch: 'upfront', but the run's RoPE rule has no second regime" in err


def test_a_merged_adapter_answers_the_same(call, home, text_words, run):
    folder = make_run(home / "elsewhere" / "adapted", *text_words, "adapter=lora")
    file = folder / "checkpoints" / "step000007.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if "lora_B" in name:
            value.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    torch.save(checkpoint, file)
    words = (f"ckpt={folder}", "prompt=a", "decode=greedy")
    code, merged, err = call(*words, "adapter.merge=true")
    assert code == 0, err
    assert merged == call(*words)[1]
    refused(call(f"ckpt={run}", "prompt=a", "adapter.merge=true"), "adapter.merge", "without an adapter")


def test_no_run_yet(call, tmp_path):
    refused(call(f"paths.root={tmp_path / 'nothing'}", "prompt=a"), "no trained run under", "train one first: python train.py")


BAD_LINES = [
    (b'{"prompt": "a"}\n{"prompt": \n', ["prompts.jsonl: line 2 is not JSON"]),
    (b'{"prompt": "a"}\n\n["a"]\n', ["line 3 is not a JSON object"]),
    (b'{"question": "why?", "x": 1}\n', ["line 1 needs either 'prompt' or 'messages'", "'question', 'x'"]),
    (b'{"prompt": "a", "messages": []}\n', ["line 1 needs either"]),
    (b'{"prompt": 3}\n', ["line 1: 'prompt' is 3, not text"]),
    (b'{"messages": "hi"}\n', ["line 1: 'messages' is not a list"]),
    (b'{"messages": []}\n', ["line 1: 'messages' is not a list"]),
    (b'{"messages": [{"role": "user"}]}\n', ["line 1: 'messages' is not a list"]),
    (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', ["line 2 is not UTF-8", "0xe9"]),
    (b"", ["prompts.jsonl: empty"]),
    (b" \n\n", ["prompts.jsonl: empty"]),
]


@pytest.mark.parametrize(("content", "words"), BAD_LINES, ids=[repr(words[0]) for _, words in BAD_LINES])
def test_bad_prompts_are_named_by_line(tmp_path, content, words):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_requests(path)
    for word in words:
        assert word in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_and_odd_line_separators_are_no_trouble(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "one\u2028line", "id": [1, 2]}\r\n{"prompt": "two"}', encoding="utf-8", newline="")
    assert [(r.id, r.given) for r in read_requests(path)] == [("[1, 2]", "one\u2028line"), (1, "two")]


def test_bad_words_are_refused(call, tmp_path, run):
    some = prompts_file(tmp_path, {"prompt": "a"})
    refused(call("prompts=nowhere.jsonl"), "prompts", "nowhere.jsonl", "cannot be read")
    refused(call(f"prompts={tmp_path}"), "prompts", "cannot be read")
    refused(call("prompt=a", f"prompts={some}"), "prompt: 'a'", "exclude each other")
    refused(call("prompt=a", "output=x.jsonl"), "output", "needs prompts=")
    refused(call("prompt=a", "n=0"), "n: 0", "at least 1")
    refused(call("prompt=a", "max_new_tokens=many"), "max_new_tokens: 'many' is not a whole number")
    refused(call("prompt=a", "max_new_tokens=0"), "max_new_tokens: 0")
    refused(call("prompt=a", "decode.temperature=-1"), "decode.temperature: -1")
    refused(call("prompt=a", "decode=gredy"), "decode", "did you mean 'greedy'")
    refused(call("prompt=a", "decode.topk=3"), "decode.topk", "did you mean 'decode.top_k'")
    refused(call("prompt=a", "engine.max_batch=0"), "engine.max_batch: 0")
    refused(call("prompt=a", "device=gpu0"), "device: 'gpu0'", "auto, cpu, cuda")
    refused(call("prompt=a", "adapter.merge=maybe"), "adapter")
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    refused(call(f"prompts={chat}"), "chat.jsonl: line 1", "conversations")
    refused(call(f"prompts={some}", f"output={tmp_path}"), "output", "cannot be written")
    refused(call(f"prompts={some}", f"output={some}"), "output", "content already")
    refused(call(f"prompts={some}", f"output={some}/below.jsonl"), "output", "cannot be written")


def test_a_missing_cuda_device_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"device: 'cuda:3', but 1 CUDA devices were found; use device=cpu"):
        device("cuda:3")


def test_numbers_are_prompts_too(call):
    code, out, err = call("prompt=2024", "decode=greedy")
    assert code == 0 and out.startswith("2024"), err


def test_the_bound_of_an_answer_that_nobody_said_is_that_of_the_options():
    """Another one counts as said, and is refused where an evaluation has its own."""
    assert compose("generate", []).max_new_tokens == ANSWER_TOKENS
