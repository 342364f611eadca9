"""The end of a run on several tasks: means, cosines of gradients by hand, and pictures of what they share."""

import json

import pytest
import torch
from torch import nn

import train
from components.contracts import Batch, ModelOutput
from framework.task_report import cosines, interference, sharing_figures

PIXELS = b"\x89PNG"


class Bigram(nn.Module):
    """Embedding and head: the gradient of a token's loss by its embedding is W^T (softmax - one-hot)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(0))
        self.head.requires_grad_(False)

    def forward(self, batch: Batch) -> ModelOutput:
        return ModelOutput(self.embed(batch.input_ids))

    @property
    def head_weight(self):
        return self.head.weight


def rows(*pairs):
    """One batch; from each first token the second is to be said."""
    ids = torch.tensor(pairs)
    return [Batch(ids[:, :1], labels=ids[:, 1:])]


def test_cosines_of_gradients_of_a_bigram_model():
    """Tokens that only one task uses do not count: a and b share token 0, from which they want different things; c shares none."""
    model = Bigram()
    figures, table = interference(model, {"a": rows((0, 1), (1, 1)), "b": rows((0, 2), (2, 2)), "c": rows((3, 3))}, torch.device("cpu"))
    w = model.head.weight.double()
    p = torch.softmax(w @ model.embed.weight[0].double(), 0)
    one, two = (w.T @ (p - torch.eye(4, dtype=torch.float64)[label]) for label in (1, 2))
    expected = torch.cosine_similarity(one, two, 0).item()
    assert table[0][1] == table[1][0] == pytest.approx(expected, rel=1e-5) and table[0][2] == table[1][2] == 0.0
    assert figures == {"tasks/gradient_cosine": pytest.approx(expected / 3, rel=1e-5), "tasks/gradient_conflicts": float(expected < 0) / 3}
    assert all(p.grad is None for p in model.parameters())
    assert interference(model, {"a": rows((0, 1))}, torch.device("cpu")) == ({}, [])
    assert cosines([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])[0][1] == 0.0


def test_sharing_in_two_numbers():
    shared = {
        "a": {"cosine": [[1.0, 0.5], [0.5, 1.0]], "effective_rank": [1.0, 2.0]},
        "b": {"cosine": [[1.0, 0.0], [0.0, 1.0]], "effective_rank": [3.0, 4.0]},
    }
    assert sharing_figures(shared) == {"tasks/update_cosine": 0.25, "tasks/effective_rank": 2.5}
    assert sharing_figures({}) == {}


@pytest.mark.parametrize(("adapter", "pictures"), [("mtl_lora", {"interference", "sharing", "mixture"}), ("lora", {"interference"})])
def test_a_run_writes_figures_and_pictures(tmp_path, adapter, pictures):
    words = [
        "model=phi4mini",
        "model/size=test",
        "optimizer=adamw",
        "data=transforms",
        "data.tasks=[sort,complement]",
        "data.tokenizer.kind=bytes",
    ]
    small = [
        "data.train_examples=40",
        "data.val_examples=10",
        "data.batch_size=2",
        "trainer.max_steps=2",
        "logger=none",
        "samples.every_steps=0",
    ]
    assert (
        train.main([f"adapter={adapter}", *words, *small, f"hydra.run.dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"])
        == 0
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for key in ("loss", "accuracy"):
        assert metrics[f"tasks/{key}"] == pytest.approx((metrics[f"eval/sort/{key}"] + metrics[f"eval/complement/{key}"]) / 2)
    assert -1 <= metrics["tasks/gradient_cosine"] <= 1 and metrics["tasks/gradient_conflicts"] in (0.0, 1.0)
    assert ("tasks/update_cosine" in metrics) is (adapter == "mtl_lora")
    made = {path.stem for path in (tmp_path / "run").glob("*.png")}
    assert made - {"loss"} == pictures
    assert all((tmp_path / "run" / f"{name}.png").read_bytes().startswith(PIXELS) for name in pictures)
