"""Imports point downward only; adding an option must not touch the layers above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STDLIB_OR = {
    "kernels": {"torch", "triton", "numpy", "kernels"},
    "components": {"torch", "numpy", "scipy", "kernels", "components"},
    "benchmarks": {"torch", "numpy", "kernels", "components", "benchmarks", "matplotlib", "rich"},
}
LAZY = {
    "components": {"transformers", "datasets", "tokenizers", "safetensors", "rich", "pyarrow", "peft", "sklearn"},
    "benchmarks": {"transformers"},
}
NEVER = {"hydra", "omegaconf", "lightning", "wandb", "framework", "conf"}
METHODS = re.compile(r"\b(samba|phi4\w*|cosmos|soap|muon|\w*lora|longrope2?|yarn|synthllm|gsa|stream_?adapter|mamba)\b", re.IGNORECASE)


def imports(file: Path):
    """(module, is it at the top level of the file) of every import."""
    tree = ast.parse(file.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0], id(node) in top


def files(layer: str):
    return sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", ["kernels", "components", "benchmarks"])
def test_layer_imports_only_downward(layer):
    import sys

    wrong = []
    for file in files(layer):
        for module, at_top in imports(file):
            allowed = module in STDLIB_OR[layer] or module in sys.stdlib_module_names
            allowed |= module in LAZY.get(layer, ()) and (not at_top or module in {"tokenizers", "safetensors", "rich"})
            if module in NEVER or not allowed:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}{' at the top' if at_top else ''}")
    assert not wrong, wrong


def test_one_method_never_imports_another():
    wrong = []
    for group in ("models", "adapters"):
        for file in (ROOT / "components" / group).glob("*.py"):
            siblings = {f.stem for f in file.parent.glob("*.py")} - {"__init__", "base", file.stem}
            for name in siblings:
                if re.search(rf"components\.{group}\.{name}\b|from components\.{group} import .*\b{name}\b", file.read_text()):
                    wrong.append(f"{file.name} imports {name}")
    assert not wrong, wrong


def test_framework_names_no_method():
    hits = [
        f"{f.relative_to(ROOT)}: {line.strip()}" for f in files("framework") for line in f.read_text().splitlines() if METHODS.search(line)
    ]
    assert not hits, hits


def test_framework_knows_components_only_through_contracts_and_helpers():
    allowed = re.compile(
        r"components\.(contracts|errors|store|losses(\.\w+)?|scaling\.(lr_law|data_law)|adapters\.base|optim\.(groups|accounting)|data\.(errors|tokenizers|token_file)|search(\.\w+)?|synthesis(\.\w+)?|evals\.(base|problems)|decode_state|decoding\.(sampling|graph_step|stops|params|constraints|batching|forward|rounds))\b"
    )
    wrong = []
    for file in files("framework"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("components") and not allowed.match(node.module):
                wrong.append(f"{file.relative_to(ROOT)} imports {node.module}")
    assert not wrong, wrong


def test_kernels_is_ours():
    """Hugging Face's hub-kernels package has the same import name; ours must win in this project."""
    import kernels

    assert Path(kernels.__file__).is_relative_to(ROOT)
