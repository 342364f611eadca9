"""Model shapes for code that must not read configurations: `python -m framework.shapes` writes benchmarks/shapes.json anew."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import OmegaConf

from framework.build import compose
from framework.overrides import CONF, group_options

SHAPES = CONF.parent / "benchmarks" / "shapes.json"


def shapes() -> dict[str, dict[str, dict[str, Any]]]:
    """{model: {size: {key: value}}} of all options as they compose; without the target and the keys that follow another group."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model in group_options("model"):
        found[model] = {}
        for size in group_options("model/size"):
            node = compose("train", [f"model={model}", f"model/size={size}"]).model
            keys = [key for key in node if key != "_target_" and not OmegaConf.is_interpolation(node, key)]
            found[model][size] = OmegaConf.to_container(OmegaConf.masked_copy(node, keys))  # type: ignore[assignment]
    return found


def text() -> str:
    """The file's contents."""
    return json.dumps(shapes(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    SHAPES.write_text(text(), encoding="utf-8")
    print(f"wrote {SHAPES}")
