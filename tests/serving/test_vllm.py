"""Exported folders in a real vLLM (its CPU build, in .venv-vllm: `make test-vllm`), against our engine on the run itself.

Phi-4-Mini with the heads of size tiny (32, the smallest that vLLM's CPU attention takes), float32, LongRoPE with random factors from 64
tokens to 256, also YaRN and plain positions. Weights are random, normal, with a std (0.05 in the embedding, 0.07 elsewhere) that makes
answers varied and keeps rounding below 5e-6 (our float32 against float64); seeds of the prompts were chosen so that the most likely token
always leads by 5e-4 or more, which is asserted. Rows of special tokens and of the padding are smaller, so that no engine says them and
every answer has all its tokens.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import generate
from components.adapters.base import task_ids
from components.contracts import Batch, SamplingParams
from components.data.tokenizers import bytes_tokenizer
from framework import build, convert
from framework.engines.native import NativeEngine

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SWITCH, TARGET, NEW = 64, 256, 32
LEAD = 5e-4  # of the most likely token, in logits: 100 times the rounding
SEEDS = {"below": 11, "at": 12, "above": 5}
LENGTHS = {"below": (3, 9, 17, 31), "at": (32, 32, 32, 32), "above": (5, 48, 64, 200)}  # of prompts; `at`: they end with 64 tokens exactly
TEXT = "def main(): <|end|>"
MESSAGES = [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Why?"}]


ADAPTERS = {"lora": ["adapter=lora"], "mtl_lora": ["adapter=mtl_lora", "data=transforms", "data.tasks=[copy,sort]"]}
TASKS = ["copy", "sort", "sort", "copy"]  # of the prompts, where the adapter has tasks


def prompts(case):
    draw = torch.Generator().manual_seed(SEEDS[case])
    return [[256, *torch.randint(256, (length - 1,), generator=draw).tolist()] for length in LENGTHS[case]]


def rope_words(kind):
    """Of a run: `none` (also under an adapter), `yarn`, or LongRoPE with random factors, by its attention-factor policy.

    transformers' folders say any attention factor, of which vLLM knows LongRoPE's own alone; under names of its own it knows any.
    """
    if kind in ADAPTERS:
        return ["rope=none", *ADAPTERS[kind]]
    if kind == "none":
        return ["rope=none"]
    if kind == "yarn":
        return ["rope=yarn", f"rope.factor={TARGET // SWITCH}"]
    draw = torch.Generator().manual_seed(0)
    long, short = (1 + scale * torch.rand(12, generator=draw, dtype=torch.float64).sort().values for scale in (3, 0.5))
    value = {"long_only": 1.3, "both": "null"}[kind]
    words = ["rope=longrope", f"rope.factor={TARGET // SWITCH}", f"rope.factors={long.tolist()}", f"rope.short_factors={short.tolist()}"]
    return [*words, f"rope.attention_factor={{policy: {kind}, value: {value}}}"]


def make_run(folder, kind):
    """A run directory of random weights. kind: of its RoPE rule, see `rope_words`."""
    words = [
        "model=phi4mini",
        "model/size=tiny",
        "model.num_layers=3",
        f"model.max_length={SWITCH}",
    ]
    words += [] if kind in ADAPTERS else ["data=chat", "data.path=none.jsonl", "task=sft"]
    config = build.compose("train", [*words, *rope_words(kind)])
    tokenizer = bytes_tokenizer()
    model = build.build_model(config, tokenizer.vocab_size)
    build.build(config.adapter).apply(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            std = 0.05 if name == "embed_tokens.weight" else 0.5 if "lambdas" in name else 0.07
            parameter.copy_(std * noise if parameter.dim() > 1 else 1 + 0.2 * noise)
        model.embed_tokens.weight[256:] *= 0.05
    config.model.vocab_size = model.vocab_size
    convert.write_run(folder, "phi4mini", config, model.state_dict())
    tokenizer.save(folder / "tokenizer")
    return folder


def ours(folder, switch, asked, task=None):
    """Ids and their log-probabilities, of our engine on the run; `switch` is rope.switch, None for a rule of one regime."""
    run = build.load_run(folder)
    if task is not None:
        task_ids(run.model).set(task)
    if switch is not None:
        run.model.set_rope(run.model.rope_spec.switched(switch))
    found = NativeEngine(run.model, run.tokenizer).generate(asked, SamplingParams(max_new_tokens=NEW, temperature=0))
    for prompt, completion in zip(asked, found, strict=True):
        with torch.no_grad():
            logits = run.model.logits(run.model(Batch(torch.tensor([prompt + completion.token_ids]))).hidden)[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        assert switch == "recompute" or (best[:, 0] - best[:, 1]).min() >= LEAD  # a row that switches has another past at each length
    return [completion.token_ids for completion in found], [completion.logprobs for completion in found]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Six runs, their exports, and what vLLM answered to all prompts, in one process."""
    assert PYTHON.is_file(), "no vLLM: make test-vllm makes .venv-vllm first"
    home = tmp_path_factory.mktemp("vllm")
    for kind in ("long_only", "both", "none", "yarn", *ADAPTERS):
        make_run(home / kind, kind)
    jobs = []
    for name, run, words, length, cases in (
        ("short", "long_only", ["task.engine=vllm", "rope.switch=always_short"], SWITCH, ("below", "at")),
        ("long", "long_only", ["task.engine=vllm", "rope.switch=always_long"], TARGET, ("above",)),
        ("two, short", "both", [], SWITCH, ("below", "at")),
        ("two, long", "both", [], TARGET, ("above",)),
        ("none", "none", [], SWITCH, ("below",)),
        ("yarn", "yarn", ["task.engine=vllm"], TARGET, ("above",)),
        ("lora", "lora", ["task.engine=vllm", "task.adapter=keep"], SWITCH, ("below",)),
        ("mtl_lora", "mtl_lora", ["task.engine=vllm", "task.adapter=keep"], SWITCH, ("below",)),
    ):
        folder = home / f"{name}_hf"
        words = [f"ckpt={home / run}", "task=export", f"task.to='{folder}'", *words, f"paths.root={home}"]
        assert generate.main([*words, f"hydra.run.dir={home / 'out'}"]) == 0
        asked = [ids for case in cases for ids in prompts(case)]
        beside = {"lora": ["adapter"] * 4, "mtl_lora": TASKS}.get(name, [])
        adapters = [str(folder / "adapters" / adapter) for adapter in beside]
        jobs.append(
            {"name": name, "folder": str(folder), "max_model_len": length, "prompts": asked, "max_tokens": NEW, "adapters": adapters}
        )
    jobs = [job | {"text": TEXT, "messages": MESSAGES} for job in jobs]
    (home / "jobs.json").write_text(json.dumps(jobs))
    worker = [PYTHON, Path(__file__).with_name("vllm_worker.py"), home / "jobs.json", home / "answers.json"]
    done = subprocess.run(worker, cwd=home, env={**os.environ, "TMPDIR": str(home)}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answers = dict(zip((job["name"] for job in jobs), json.loads((home / "answers.json").read_text()), strict=True))
    return home, answers


def same(answer, found, at):
    """Identical tokens, log-probabilities within 1e-5. at: of the case's first prompt among those of the job."""
    ids, logprobs = found
    assert answer["ids"][at : at + len(ids)] == ids and all(len(row) == NEW for row in ids)
    theirs, ours = (torch.tensor(rows, dtype=torch.float64) for rows in (answer["logprobs"][at : at + len(ids)], logprobs))
    worst = (theirs - ours).abs().max()
    print(f"largest difference of a log-probability: {worst:.1e}")
    assert worst <= 1e-5
    assert len({i for row in ids for i in row}) > 20  # no loop of a few tokens


CASES = {"below": (0, "short", "always_short"), "at": (4, "short", "always_short"), "above": (0, "long", "always_long")}


@pytest.mark.parametrize("case", CASES)
def test_one_regime_for_all_rows(home, case):
    """32 greedy tokens of 4 prompts: below the switch, up to it exactly, and beyond, where one prompt crosses it and one begins below."""
    folder, answers = home
    at, job, switch = CASES[case]
    same(answers[job], ours(folder / "long_only", switch, prompts(case)), at)


@pytest.mark.parametrize("case", ["below", "at"])
def test_rows_up_to_the_switch_are_those_of_the_run_itself(home, case):
    """As it was trained, with both regimes (recompute): a row of exactly 64 tokens is still short."""
    folder, answers = home
    same(answers["short"], ours(folder / "long_only", "recompute", prompts(case)), CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_of_two_tables_vllm_takes_one_when_it_starts(home, case):
    """A folder with both, as transformers reads it: the long one for all rows where max_model_len is above the switch."""
    folder, answers = home
    at, job, switch = CASES[case]
    same(answers[f"two, {job}"], ours(folder / "both", switch, prompts(case)), at)


@pytest.mark.parametrize(("kind", "case"), [("none", "below"), ("yarn", "above")])
def test_rules_of_one_regime(home, kind, case):
    folder, answers = home
    same(answers[kind], ours(folder / kind, None, prompts(case)), 0)


def test_an_adapter_beside_its_base(home):
    """A LoRA that was kept out of the weights."""
    folder, answers = home
    same(answers["lora"], ours(folder / "lora", None, prompts("below")), 0)


def test_the_tasks_of_an_adapter_in_one_batch(home):
    """Each task of MTL-LoRA as a LoRA of its own, two prompts each; ours has the tasks apart."""
    folder, answers = home
    found = [ours(folder / "mtl_lora", None, [ids], task) for ids, task in zip(prompts("below"), TASKS, strict=True)]
    same(answers["mtl_lora"], tuple([row for (row,) in column] for column in zip(*found, strict=True)), 0)
    other, _ = ours(folder / "mtl_lora", None, prompts("below")[:1], "sort")
    assert other[0] != answers["mtl_lora"]["ids"][0]


def test_the_regimes_differ(home):
    """Else none of this would show which one is used: the same prompts under the other table."""
    folder, answers = home
    ids, _ = ours(folder / "long_only", "always_long", prompts("at"))
    assert answers["short"]["ids"][4:] != ids


def test_its_tokenizer_gives_our_ids(home):
    folder, answers = home
    run = build.load_run(folder / "long_only")
    data = build.build_data(run.cfg)
    data.tokenizer = run.tokenizer
    text = TEXT.removesuffix("<|end|>")
    for answer in (answer for name, answer in answers.items() if name not in ADAPTERS):
        assert answer["chat_ids"] == data.render(MESSAGES)
        assert answer["text_ids"] == [run.tokenizer.eot_id, *run.tokenizer.encode(text), run.tokenizer.special_id("<|end|>")]
