"""Roll-outs: answers are sorted, paired and counted by hand-written scripts of an engine; and the command on a real run."""

import json
import math
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import generate
from components.contracts import Completion, SamplingParams, UserError
from components.data.tokenizers import bytes_tokenizer
from components.rewards.final_number import FinalNumber
from framework.build import build_data, compose, load_run
from framework.tasks.rollouts import Answered, Rollouts, accuracy, problems_of
from framework.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps on a few problems: it solves none."""
    folder = tmp_path_factory.mktemp("reasoning")
    words = [
        "model/size=test", "data=reasoning", "data.train_problems=40", "data.val_problems=5", "data.operations=1", "data.seq_len=64",
        "data.batch_size=4", "trainer.max_steps=2", "samples.every_steps=0", "logger=none", f"paths.cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.train.loss_curve", lambda *args: None)
        train(compose("train", words), folder / "run")
    return folder / "run"


class Scripted:
    """Says what is written for a prompt, one after the other; a text that ends in `...` did not end by itself."""

    def __init__(self, script):
        self.script, self.asked = {prompt: iter(texts) for prompt, texts in script.items()}, []

    def generate(self, prompts, params):
        tokenizer = bytes_tokenizer()
        assert all(ids[0] == tokenizer.eot_id for ids in prompts)
        self.asked = [tokenizer.decode(ids[1:]) for ids in prompts]
        texts = [next(self.script[prompt]) for prompt in self.asked]
        return [Completion(tokenizer.encode(t), t, [], "length" if t.endswith("...") else "stop") for t in texts]


SCRIPT = {
    "2+3=": ["2+3=5 #5", "2+3=6 #6", "so #5", "2+3=6 #6"],  # two right, the same wrong one twice
    "1*9=": ["1*9=8 #8", "#7", "1*9=9 and on...", "#6"],  # none right
    "4-4=": ["4-4=0 #0"] * 4,
}
SOLUTIONS = {"2+3=": "2+3=5 #5", "1*9=": "1*9=9 #9", "4-4=": "4-4=0 #0"}


def roll_out(run, folder, **changes):
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": p, "solution": s}) + "\n" for p, s in SOLUTIONS.items()))
    options = {"problems": str(problems), "split": "train", "most_problems": None, "n": 4, "most_pairs": 2, "verify": FinalNumber("#")}
    task = Rollouts(**(options | {"output": None} | changes))
    context = SimpleNamespace(
        run=load_run(run), engine=Scripted(SCRIPT), params=SamplingParams(), out_dir=folder / "out", cache_dir=folder, task=None
    )
    return task.run(context), folder / "out" / "pairs.jsonl"


def test_pairs_and_counts_by_hand(run, tmp_path, capsys):
    metrics, path = roll_out(run, tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [
        {"prompt": "2+3=", "chosen": "2+3=5 #5", "rejected": "2+3=6 #6", "source": "rollout"},
        {"prompt": "1*9=", "chosen": "1*9=9 #9", "rejected": "1*9=8 #8", "source": "solution"},
        {"prompt": "1*9=", "chosen": "1*9=9 #9", "rejected": "#7", "source": "solution"},
    ]
    assert (metrics["pairs"], metrics["pairs_from_solutions"], metrics["problems"], metrics["samples"]) == (3, 2, 3, 12)
    assert metrics["accuracy"] == pytest.approx((0.5 + 0 + 1) / 3) and metrics["finished"] == pytest.approx(11 / 12)
    assert metrics["accuracy_se"] == pytest.approx(0.5 / math.sqrt(3))  # of 0.5, 0 and 1
    said = capsys.readouterr().err
    assert "3 pairs in" in said and f"next: python train.py task=dpo data=preference data.path={path} ckpt={run}" in said
    assert "accuracy 0.5000 +- 0.2887 (standard error) over 3 problems, 4 answer(s) each; 91.7% ended by themselves" in said


def test_pairs_can_be_trained_on(run, tmp_path):
    """What is written is what data=preference reads, with the prompts that were asked."""
    _, path = roll_out(run, tmp_path)
    words = ["task=dpo", "data=preference", f"data.path={path}", f"ckpt={run}", "data.tokenizer.kind=bytes", "data.seq_len=32"]
    data = build_data(compose("train", [*words, "data.batch_size=1", "data.val_fraction=0.4"]))
    data.prepare(tmp_path / "cache", load_run(run).tokenizer)
    assert data.summary()["pairs"] == 3


def test_a_file_with_content_is_refused_before_anything_is_asked(run, tmp_path):
    taken = tmp_path / "taken.jsonl"
    taken.write_text("kept")
    with pytest.raises(UserError, match=r"output: '.*taken.jsonl' has content already"):
        roll_out(run, tmp_path, output=str(taken))
    assert taken.read_text() == "kept"


def test_wrong_answers_meet_right_ones_in_turn():
    problem = Answered("p", "solution", right=["a", "b", "a"], wrong=["x", "y", "x", "z", "w"])
    assert [(row["chosen"], row["rejected"]) for row in problem.pairs(3)] == [("a", "x"), ("b", "y"), ("a", "z")]


def test_accuracy_of_one_problem_has_no_spread():
    assert accuracy([Answered("p", "s", right=["a"], wrong=["b"])])["accuracy_se"] == 0.0


def test_nothing_wrong_is_said_and_writes_nothing(run, tmp_path, capsys):
    problems = tmp_path / "one.jsonl"
    problems.write_text('{"prompt": "4-4=", "solution": "#0"}')
    metrics, path = roll_out(run, tmp_path, problems=str(problems))
    assert metrics["pairs"] == 0 and not path.exists() and "no finished answer was wrong" in capsys.readouterr().err


def generated(folder, *words):
    return generate.main([*words, "device=cpu", "max_new_tokens=4", f"paths.output_dir={folder}", f"hydra.run.dir={folder}"])


def test_held_out_problems_are_measured_and_give_no_pairs(run, tmp_path, capsys):
    assert generated(tmp_path, "task=rollouts", "task.split=val", "decode=greedy", f"ckpt={run}") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["problems"], metrics["samples"], metrics["accuracy"]) == (5, 5, 0) and not (tmp_path / "pairs.jsonl").exists()
    assert "over 5 problems" in capsys.readouterr().err


def test_problems_of_another_run(run, tmp_path):
    """A run that was trained on pairs has no problems of its own; those of the run before it are named."""
    words = ("task=rollouts", f"task.problems={run}", "task.most_problems=3", "n=2", f"ckpt={run}")
    assert generated(tmp_path, *words) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["samples"] == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", 'empty; give a line {"prompt": "2+3=", "solution": "#5"} for each problem'),
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a"}', "line 1 needs prompt and solution, both text; it has 'prompt'"),
        ("[1]", "line 1 needs prompt and solution, both text; it has list"),
    ],
)
def test_bad_problems_are_one_line(tmp_path, content, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        Rollouts(str(path), "train", None, 1, 1, FinalNumber("#"), None)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_mistakes_are_one_line(run, tmp_path, capsys):
    with pytest.raises(UserError, match=r"task.problems: '.*nowhere.jsonl' cannot be read"):
        Rollouts(str(tmp_path / "nowhere.jsonl"), "train", None, 1, 1, FinalNumber("#"), None)
    with pytest.raises(UserError, match="n: 0; at least 1 is allowed"):
        Rollouts(None, "train", None, 0, 1, FinalNumber("#"), None)
    OmegaConf.save(compose("train", []), tmp_path / "config.yaml")
    with pytest.raises(
        UserError, match=r"task.problems: the data of .* \(StdlibData\) has no problems with solutions; give task.problems="
    ):
        problems_of(tmp_path, "train")
    (tmp_path / "config.yaml").unlink()
    assert generated(tmp_path / "out", "task=rollouts", f"task.problems={tmp_path}", f"ckpt={run}") == 2
    assert "is not a run" in capsys.readouterr().err
