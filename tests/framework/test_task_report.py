"""The end of a run on several tasks: means, cosines of gradients by hand, and pictures of what they share."""

import json

import pytest
import torch
from torch import nn

import train
from components.contracts import Batch, ModelOutput
from framework import evaluation_plots
from framework.task_report import by_layer, cosines, draw, interference, sharing_figures

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


def test_tasks_without_a_parameter_in_common_have_no_cosine():
    """As where the rows of one new task alone are trained: 0 would read as "they do not pull apart"."""
    assert interference(Bigram(), {"a": rows((0, 1)), "b": rows((3, 2))}, torch.device("cpu")) == ({}, [])


SHARED = {
    "layers.0.up": {"shares": [[0.2, 0.8], [0.6, 0.4]], "cosine": [[1.0, -0.5], [-0.5, 1.0]], "effective_rank": [1.0, 2.0]},
    "layers.0.down": {"shares": [[0.4, 0.6], [0.6, 0.4]], "cosine": [[1.0, 0.1], [0.1, 1.0]], "effective_rank": [3.0, 2.0]},
    "layers.1.up": {"shares": [[1.0, 0.0], [0.0, 1.0]], "cosine": [[1.0, 0.8], [0.8, 1.0]], "effective_rank": [1.0, 1.5]},
}


def test_what_tasks_share_is_drawn_by_layer_with_fixed_colours(tmp_path, monkeypatch):
    found = by_layer(SHARED)
    assert list(found) == ["0", "1"] and list(by_layer({"adapter_input": SHARED["layers.1.up"]})) == ["adapter_input"]
    assert found["0"]["shares"].tolist() == [[pytest.approx(0.3), pytest.approx(0.7)], [0.6, 0.4]]
    assert found["0"]["cosine"].tolist() == [pytest.approx(-0.2)] * 2 and found["0"]["effective_rank"].tolist() == [2.0, 2.0]
    pictures = {}
    monkeypatch.setattr(evaluation_plots, "save", lambda figure, path: pictures.update({path.stem: figure}))
    assert [path.stem for path in draw(tmp_path, ["a", "b"], [[1.0, 0.3], [0.3, 1.0]], SHARED)] == list(pictures)
    images = {name: [axes.images[0] for axes in figure.axes] for name, figure in pictures.items()}
    assert {name: [image.get_clim() for image in some] for name, some in images.items() if name != "sharing_layers"} == {
        "interference": [(-1, 1)], "sharing": [(-1, 1)], "mixture": [(0, 1)] * 2,
    }  # fmt: skip
    first, second = (image.get_array().tolist() for image in images["mixture"])
    assert first == [[pytest.approx(0.3), 0.6], [1.0, 0.0]] and second == [[pytest.approx(0.7), 0.4], [0.0, 1.0]]
    alike, ranks = images["sharing_layers"]
    assert alike.get_clim() == (-1, 1) and alike.get_array().tolist() == [[pytest.approx(-0.2)] * 2, [0.8, 0.8]]
    assert ranks.get_array().tolist() == [[2.0, 2.0], [1.0, 1.5]]
    assert [text.get_text() for text in pictures["mixture"].axes[0].get_yticklabels()] == ["0", "1"]


def test_sharing_in_two_numbers():
    shared = {
        "a": {"cosine": [[1.0, 0.5], [0.5, 1.0]], "effective_rank": [1.0, 2.0]},
        "b": {"cosine": [[1.0, 0.0], [0.0, 1.0]], "effective_rank": [3.0, 4.0]},
    }
    assert sharing_figures(shared) == {"tasks/update_cosine": 0.25, "tasks/effective_rank": 2.5}
    assert sharing_figures({}) == {}


@pytest.mark.parametrize(
    ("adapter", "pictures"), [("mtl_lora", {"interference", "sharing", "mixture", "sharing_layers"}), ("lora", {"interference"})]
)
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
