"""Generation: useful tokens a second of our continuous batching, of transformers' static batch on the same exported weights, and of vLLM.

`python -m benchmarks.engine` (a minute on two cores). 32 requests with prompts of 8 to 200 tokens and answers of 8 to 128, greedy, their
lengths forced; model phi4mini with 4 layers of width 256, random weights, float32 for all sides. Useful tokens are those that were asked
for: a static batch goes on for all rows until the longest is finished. Sides take turns in one run, with as many threads and the same
allocator settings; ours takes its time to pack the weights in every turn. --vllm PYTHON adds vLLM in a process of its own, which is the
Python of .venv-vllm (see the Makefile). A hybrid model of the same size is timed beside it: its number to meet is 1.3 times the time.
Before anything is timed, answers are compared with transformers' `generate` of each prompt alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    Clock,
    append_row,
    environment,
    interleaved,
    model_shape,
    raise_allocator_thresholds,
    spread,
    table,
    verdict,
)
from components.blocks import Decoder
from components.contracts import SamplingParams
from components.decoding.batching import Batcher, Row, never_said
from components.decoding.constraints import Constraints
from components.decoding.forward import Forward
from components.interop.phi3 import to_phi3, write
from components.models.phi4mini import Phi4Mini
from components.models.samba import Samba
from components.rope.rules import NoRescaling

VOCABULARY, LONGEST = 2048, 512
PROMPTS, ANSWERS = (8, 200), (8, 128)  # lengths in tokens, evenly drawn
WIDE = {"hidden_size": 256, "num_layers": 4, "intermediate_size": 704, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32}


def seconds_by(clock: Callable[[], float]) -> Clock:
    """A clock of `interleaved`; a side that returns a number has measured itself."""

    def measure(run: Callable[[], object]) -> float:
        began = clock()
        found = run()
        return found if isinstance(found, float) else clock() - began

    return measure


BOUNDS = {"transformers": 2.0, "vllm": 1.0}  # ours must be so many times faster
HYBRID_BOUND = 1.3
CLOCKS = {"wall": seconds_by(time.perf_counter), "cpu": seconds_by(time.process_time)}

Job = tuple[list[int], int]  # prompt ids, tokens of the answer

# Answers each line that it reads: the seconds of all requests by a clock, or their ids.
VLLM_WORKER = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, jobs, longest = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
sizes = dict(max_model_len=longest, max_num_seqs=len(jobs), enable_prefix_caching=False)
llm = LLM(folder, dtype="float32", skip_tokenizer_init=True, seed=0, **sizes)
params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in jobs]
for line in sys.stdin:
    clock = time.process_time if line.strip() == "cpu" else time.perf_counter
    began = clock()
    found = llm.generate([{"prompt_token_ids": ids} for ids, _ in jobs], params, use_tqdm=False)
    seconds = clock() - began
    print("ANSWER" + json.dumps(seconds if line.strip() != "ids" else [list(out.outputs[0].token_ids) for out in found]), flush=True)
"""


class Ids:
    """Stands for a tokenizer: no side makes text."""

    vocab_size, eot_id = VOCABULARY, 0
    stop_ids: tuple[int, ...] = ()
    unsaid_ids: tuple[int, ...] = ()

    def decode(self, ids: Iterable[int]) -> str:
        return ""


def requests(count: int, seed: int = 0) -> list[Job]:
    """Prompts of random ids, and how many tokens each answer has."""
    draw = random.Random(seed)
    return [([draw.randrange(VOCABULARY) for _ in range(draw.randint(*PROMPTS))], draw.randint(*ANSWERS)) for _ in range(count)]


def models() -> dict[str, Decoder]:
    """The two models of one size, in eval mode; weights large enough that the most likely token leads by more than rounding."""
    found: dict[str, Decoder] = {}
    for name, kind in (("phi4mini", Phi4Mini), ("samba", Samba)):
        torch.manual_seed(0)
        found[name] = kind(**shape_of(name), rope=NoRescaling()).eval()
        with torch.no_grad():
            for parameter in found[name].parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2)
    return found


def shape_of(name: str) -> dict[str, Any]:
    keys = [key for key in json.loads((Path(__file__).parent / "shapes.json").read_text())[name]["tiny"]]
    return {**model_shape(name, "tiny", *keys), **WIDE, "vocab_size": VOCABULARY, "max_length": LONGEST}


def native(model: Decoder, jobs: list[Job], max_batch: int, prefill_chunk: int, packed: bool = True) -> list[list[int]]:
    """Our answers, with all that belongs to one generation."""
    ids: Any = Ids()
    blocked = never_said(model.vocab_size, ids)
    batcher = Batcher(Forward(model, packed=packed), ids, (), blocked, Constraints(ids, model.vocab_size), max_batch, prefill_chunk)
    rows = [Row(prompt, SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)) for prompt, tokens in jobs]
    for row in rows:
        batcher.add(row.ids, [row])
    while batcher.busy:
        batcher.round()
    return [row.new_ids for row in rows]


def export(model: Decoder, folder: Path) -> None:
    """Write the weights as transformers and vLLM read them."""
    config = shape_of("phi4mini")
    write(folder, to_phi3(dict(model.state_dict()), config), config, 0, 1 << 40)


def transformers_sides(folder: Path, jobs: list[Job]) -> tuple[Callable[[], object], Callable[[], list[list[int]]]]:
    """The static batch, padded on the left; and the answers to each prompt alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    longest = max(len(prompt) for prompt, _ in jobs)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in jobs])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in jobs])
    most = max(tokens for _, tokens in jobs)

    def answer(ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> torch.Tensor:
        return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    def alone() -> list[list[int]]:
        said = [answer(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.int64), tokens) for prompt, tokens in jobs]
        return [out[0, len(prompt) :].tolist() for out, (prompt, _) in zip(said, jobs, strict=True)]

    return lambda: answer(ids, mask, most), alone


def start_vllm(python: str, folder: Path, jobs: list[Job], stack: ExitStack) -> Callable[[str], Any]:
    """A process that answers `wall` or `cpu` with seconds, `ids` with ids."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    words = [str(Path(python).absolute()), "-c", VLLM_WORKER, str(folder), str(folder / "jobs.json"), str(LONGEST)]
    pipe, log = subprocess.PIPE, stack.enter_context((folder / "vllm.log").open("w"))
    worker = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=log, text=True, env=os.environ | quiet | threads, cwd=folder)
    stack.callback(worker.kill)

    def ask(what: str) -> Any:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(what + "\n")
        worker.stdin.flush()
        for line in worker.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        raise RuntimeError(f"vLLM ended: {(folder / 'vllm.log').read_text()[-500:]}")

    return ask


def main() -> None:
    """Compare answers, measure, print the table, write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--prefill-chunk", type=int, default=256)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time, on a machine that others use too")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM's CPU build")
    options = parser.parse_args()
    raise_allocator_thresholds()
    jobs, made = requests(options.requests), models()
    useful, limits = sum(tokens for _, tokens in jobs), (options.max_batch, options.prefill_chunk)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        export(made["phi4mini"], folder)
        static, alone = transformers_sides(folder, jobs)
        ours, theirs = native(made["phi4mini"], jobs, *limits), alone()
        equal = {"transformers": sum(a == b for a, b in zip(ours, theirs, strict=True))}
        if ours != theirs:
            raise SystemExit(f"{equal['transformers']} of {len(jobs)} answers are those of transformers; nothing was timed")
        sides: dict[str, Callable[[], object]] = {
            "native": lambda: native(made["phi4mini"], jobs, *limits),
            "native, weights not packed": lambda: native(made["phi4mini"], jobs, *limits, packed=False),
            "transformers": static,
            "native, hybrid": lambda: native(made["samba"], jobs, *limits),
        }
        if options.vllm:
            ask = start_vllm(options.vllm, folder, jobs, stack)
            equal["vllm"] = sum(a == b for a, b in zip(ours, ask("ids"), strict=True))
            sides["vllm"] = lambda: ask(options.clock)
        seconds = interleaved(sides, dict.fromkeys(sides, options.rounds), clock=CLOCKS[options.clock])
    print(f"{useful} useful tokens; answers equal to ours of {len(jobs)}: " + ", ".join(f"{name} {n}" for name, n in equal.items()))
    spreads = {name: spread([useful / value for value in values]) for name, values in seconds.items()}
    lines = [[name, *(f"{rate[key]:.0f}" for key in ("median", "min", "max"))] for name, rate in spreads.items()]
    print(table(["side", "useful tokens/s", "least", "most"], lines))
    ratios = {name: spreads["native"]["median"] / spreads[name]["median"] for name in BOUNDS if name in spreads}
    for name, ratio in ratios.items():
        print(f"native is {ratio:.2f} times as fast as {name}; {verdict(ratio, BOUNDS[name], at_least=True)}")
    slower = spreads["native"]["median"] / spreads["native, hybrid"]["median"]
    print(f"the hybrid takes {slower:.2f} times the time; {verdict(slower, HYBRID_BOUND, at_least=False)}")
    row = {
        **environment("transformers"),
        **vars(options),
        "vllm": bool(options.vllm),
        "shape": WIDE,
        "useful_tokens": useful,
        "tokens_per_second": spreads,
    }
    print(f"row appended to {append_row('engine', row | {'equal': equal, 'ratios': ratios, 'hybrid_time': slower})}")


if __name__ == "__main__":
    main()
