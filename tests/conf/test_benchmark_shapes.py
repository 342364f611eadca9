"""The benchmarks' copy of the model sizes is the one that the option files compose to."""

import json

from benchmarks.common import model_shape
from framework import shapes


def test_shapes_are_those_of_the_options():
    stored = json.loads(shapes.SHAPES.read_text(encoding="utf-8"))
    assert stored == shapes.shapes(), "stale: run python -m framework.shapes"


def test_a_benchmark_reads_the_composed_size():
    node = shapes.compose("train", ["model=samba", "model/size=small"]).model
    keys = ("hidden_size", "state_size", "conv_kernel", "expand", "dt_rank")
    assert model_shape("samba", "small", *keys) == {key: node[key] for key in keys}
