"""eval=code: canonical solutions pass and mutants fail, in a continuation and in a code block; pass@k by hand; refusals."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from exams import TOKENIZER, Scripted, exam

from components.contracts import UserError
from components.evals.code import Code, program

CONF = Path(__file__).parents[3] / "conf" / "eval" / "code.yaml"
FUNCTIONS = Path(__file__).parent / "files" / "functions.jsonl"
DATA = os.environ.get("PATCHBAY_DATA")  # a folder with gsm8k/ and humaneval/ as their authors publish them


def option(path: Any = FUNCTIONS, **changes: Any) -> Code:
    node = yaml.safe_load(CONF.read_text())
    del node["_target_"]
    return Code(**{**node, "path": str(path), "execute": True, **changes})


def rows_of(path: Path) -> list[dict[str, str]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def statuses(path: Path, answer: Any, **changes: Any) -> list[str]:
    """How the tests of each problem end for answer(row)."""
    evaluation = option(path, **changes)
    return [evaluation.judge(row["task_id"], answer(row)).status for row in rows_of(path)]


def canonical(row: dict[str, str]) -> str:
    return row["canonical_solution"]


def in_a_block(row: dict[str, str]) -> str:
    return f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}```\nIt does what you want. def f(:"


def test_solutions_pass_and_wrong_ones_do_not():
    assert statuses(FUNCTIONS, canonical) == ["passed"] * 3 == statuses(FUNCTIONS, in_a_block)
    assert statuses(FUNCTIONS, lambda row: "    return None\n") == ["failed"] * 3
    assert statuses(FUNCTIONS, lambda row: "    return undefined\n") == ["error"] * 3
    assert statuses(FUNCTIONS, lambda row: "    while True: pass\n", timeout_seconds=0.3) == ["timeout"] * 3
    assert statuses(FUNCTIONS, lambda row: "    return 1\nexit()") == ["error"] * 3


def test_a_continuation_ends_at_a_stop_and_a_block_does_not():
    assert statuses(FUNCTIONS, lambda row: row["canonical_solution"] + "\nprint(undefined)\n") == ["passed"] * 3
    assert statuses(FUNCTIONS, lambda row: row["canonical_solution"] + "\nx = undefined\n") == ["error"] * 3
    helper = "```\ndef helper(v):\n    return v\n\ndef root(n):\n    return helper(int(n ** 0.5))\n```"
    assert option().judge("own/2", helper).status == "passed"
    assert (
        option().judge("own/1", "```\ndef mirrored(text: str) -> str:\n    return twice(text)[::-1]\n```").status == "passed"
    )  # the prompt's helper
    assert program("def f():\n", "```python\n    return 1\n```", "f", ()) == "def f():\n    return 1\n"


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="PATCHBAY_DATA names no folder with humaneval/HumanEval.jsonl.gz")
@pytest.mark.parametrize("answer", [canonical, in_a_block])
def test_every_canonical_solution_of_humaneval_passes(answer):
    assert statuses(Path(str(DATA)) / "humaneval" / "HumanEval.jsonl.gz", answer, timeout_seconds=10.0) == ["passed"] * 164


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="PATCHBAY_DATA names no folder with humaneval/HumanEval.jsonl.gz")
def test_no_mutant_of_humaneval_passes():
    found = statuses(Path(str(DATA)) / "humaneval" / "HumanEval.jsonl.gz", lambda row: "    return None\n", timeout_seconds=10.0)
    assert "passed" not in found and "timeout" not in found


def replies(rights: dict[str, list[bool]]) -> Any:
    """Right and wrong programs in turn, by the function that a prompt asks for."""
    rows = {row["prompt"]: (row["canonical_solution"], iter(rights[row["task_id"]])) for row in rows_of(FUNCTIONS)}

    def reply(prompt: str) -> str:
        solution, plan = next(value for text, value in rows.items() if prompt.endswith(text))
        return solution if next(plan) else "    return None\n"

    return reply


def test_pass_at_k_by_hand():
    """2, 0 and 1 of 3 right: pass@1 = (2/3 + 0 + 1/3) / 3; pass@2 = (1 + 0 + 2/3) / 3."""
    rights = {"own/0": [True, False, True], "own/1": [False] * 3, "own/2": [False, False, True]}
    evaluation = option(samples=3, ks=[1, 2])
    rows = list(evaluation.rows(exam(Scripted(replies(rights)))))
    figures, words = evaluation.summary(rows)
    assert len(rows) == 9 and sum(row.values["score"] for row in rows) == 3
    assert figures["pass@1"] == pytest.approx(1 / 3) and figures["pass@2"] == pytest.approx(5 / 9)
    assert figures["pass@1_se"] == pytest.approx((1 / 3) / 3**0.5)  # of 2/3, 0, 1/3: s = 1/3
    assert {status: figures[status] for status in ("passed", "failed", "timeout", "error")} == {
        "passed": 3.0, "failed": 6.0, "timeout": 0.0, "error": 0.0
    }  # fmt: skip
    first, second, third = words.splitlines()
    assert first == "pass@1 33.3 % (standard error 19.2), pass@2 55.6 % (standard error 29.4) over 3 problem(s), 3 program(s) each"
    assert second == "programs: 3 passed, 6 failed, 0 timeout, 0 error" and third.startswith("sandbox: ")
    assert {row.record["problem"] for row in rows} == set(rights) and all("def" not in row.record["got"] for row in rows)


def test_programs_that_are_all_alike_are_mentioned():
    evaluation = option(samples=2, items=1)
    _, words = evaluation.summary(list(evaluation.rows(exam(Scripted(lambda prompt: "    return 1\n")))))
    assert words.endswith("all 2 programs of every problem are alike; decode=sample makes different ones")


def test_what_is_asked():
    row = rows_of(FUNCTIONS)[0]
    (item, *_) = option().items(exam())
    assert TOKENIZER.decode(item.prompt[1:]) == row["prompt"]
    said: list[str] = []
    frame = ([TOKENIZER.eot_id], [TOKENIZER.special_id("<|assistant|>")])
    option(items=1).items(exam(frame=frame, render=lambda text: said.append(text) or [7]))
    assert said[0].startswith("Complete this Python function.") and f"```python\n{row['prompt']}\n```" in said[0]
    (item, *_) = option(template="# write\n{prompt}").items(exam())
    assert TOKENIZER.decode(item.prompt[1:]) == "# write\n" + row["prompt"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"execute": False},
            "eval.execute: false; eval=code runs what the model writes, in a sandboxed process; eval.execute=true allows it",
        ),
        ({"ks": [1, 2]}, r"eval.ks: \[1, 2\]; must be numbers from 1 to eval.samples=1"),
        ({"ks": []}, r"eval.ks: \[\]"),
        ({"template": "write"}, r"eval.template: 'write'; it needs \{prompt\} once"),
        ({"stop": [""]}, "eval.stop: holds an empty text"),
        ({"timeout_seconds": 0.0}, "eval.timeout_seconds: 0.0; must be above 0"),
        ({"memory_mb": 8}, "eval.memory_mb: 8; must be a whole number of at least 64"),
        ({"samples": 0}, "eval.samples: 0"),
    ],
)
def test_bad_values_are_refused(changes, line):
    with pytest.raises(UserError, match=line):
        option(**changes)


def test_bad_files_are_refused(tmp_path):
    row = rows_of(FUNCTIONS)[0]
    (tmp_path / "twice.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(UserError, match="line 2: task_id 'own/0' stands there a second time"):
        option(tmp_path / "twice.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "x", "test": "y"}) + "\n")
    with pytest.raises(UserError, match="line 1 has only prompt, test; it needs prompt, entry_point, test, task_id"):
        option(tmp_path / "other.jsonl")
    with pytest.raises(UserError, match=r"eval.max_new_tokens: \d+ tokens; this engine takes at most 40"):
        option().items(exam(limit=40))
