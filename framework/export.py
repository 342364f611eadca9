"""Option task=export, and `python -m framework.convert RUN --format`: a run as a checkpoint of another project.

Nothing appears under the given name before it was read back and gave the same logits bit for bit, and each adapter beside it, whose
products may be rounded otherwise than in the run, the same tensors bit for bit and logits within that rounding.
"""

from __future__ import annotations

import copy
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components.errors import UserError

if TYPE_CHECKING:
    from framework.build import Run
    from framework.generate import Context

ROUNDINGS = 1000.0  # units in the last place of the largest logit that another order of products may cost
ADAPTERS = "adapters"  # folder of the adapters that lie beside an exported base
PROBE_TOKENS = 64  # of the text on which an export must give the same logits


def interop() -> Any:
    """The folder of layouts. Its modules join by existing, so that no layout is named here; loaded late, since torch comes with it."""
    return import_module("components.interop")


def layout_named(name: str, key: str) -> Any:
    """The layout of that name. Raises UserError naming those there are."""
    known = interop().layouts()
    if name not in known:
        raise UserError(f"{key}: {name!r} is not one of {', '.join(sorted(known))}")
    return known[name]


class Export:
    """Option task=export: write the run as a folder that transformers or vLLM reads, or in the layout of another project.

    `rope` and `rope.switch` of generate.yaml hold for what is written.

    Args:
        to: folder to write, new or empty; None: `export` in the output folder.
        format: name of a layout; None: the one whose folders `engine` builds this model from.
        engine: what is to read it, which decides what can be expressed: transformers changes RoPE tables when a batch outgrows the first,
            vLLM has one table for all rows.
        shard_bytes: files are at most this large; None: 5 GB.
        adapter: merge: the run's adapter, that of `adapter.task` where there are several, is merged into the weights. keep: the base is
            written as it is, and beside it adapters/NAME/, in PEFT's layout for `adapter.task`, or for each task or expert; with experts
            also adapters/routing.json, which says the expert of each mode.
    """

    def __init__(
        self, to: str | None, format: str | None, engine: Literal["transformers", "vllm"], shard_bytes: int | None,
        adapter: Literal["merge", "keep"],
    ) -> None:  # fmt: skip
        if shard_bytes is not None and shard_bytes < 1:
            raise UserError(f"task.shard_bytes: {shard_bytes}; null or at least 1 is allowed")
        self.to, self.format, self.engine, self.shard_bytes, self.adapter = to, format, engine, shard_bytes, adapter
        self.asks_every_task = adapter == "keep"

    def run(self, context: Context) -> dict[str, float]:
        """Write it, say where it is and what to do with it."""
        to = Path(self.to) if self.to is not None else context.out_dir / "export"
        layout = layout_for(context.run, self.format, self.engine, "task.format")
        done = export(context.run, to, layout, self.engine, self.shard_bytes, "task.to", context.task, self.adapter)
        for line in done.notes:
            print(line, file=sys.stderr)
        size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
        print(f"{to}: {done.tensors} tensors in layout {layout.name}, {size / 1e6:.1f} MB, read back with equal logits. Next: {done.use}")
        return {"export/tensors": float(done.tensors), "export/bytes": float(size)}


@dataclass
class Exported:
    """tensors: how many were written; notes: what the reader does otherwise than we do; use: what to type next."""

    tensors: int
    notes: list[str]
    use: str


def layout_for(run: Run, name: str | None, engine: str, key: str) -> Any:
    """The layout to write `run` in. Raises UserError when none holds its model, or `engine` does not read the one that was named."""
    kind = run.cfg.model._target_
    holding = layouts_holding(kind)
    if name is not None:
        chosen = layout_named(name, key)
        if holding[name] is None:
            allowed = ", ".join(other for other, layout in holding.items() if layout is not None) or "none"
            raise UserError(f"{key}: {name} does not hold a {kind}, which {run.path} is; allowed: {allowed}")
        if engine not in (chosen.engines or ("transformers",)):
            raise UserError(f"task.engine: {engine} does not read the layout {name}; drop the override")
        return chosen
    fitting = [layout for layout in holding.values() if layout is not None]
    for layout in fitting:
        if engine in layout.engines:
            return layout
    others = " or ".join(f"{key}={layout.name}" for layout in fitting if not layout.engines)
    ways = f"; write it for other code with {others}" if others else ""
    raise UserError(f"task.engine: {engine} has no class for a {kind}{ways}")


def layouts_holding(kind: str) -> dict[str, Any]:
    """{name: the layout if it holds models of this class, else None}."""
    from framework import build

    known = interop().layouts()
    targets = {
        name: build.compose("train", [f"model={name}", "model/size=test"]).model._target_ for name in {x.model for x in known.values()}
    }
    return {name: layout if targets[layout.model] == kind else None for name, layout in known.items()}


def export(
    run: Run, to: Path, layout: Any, engine: str, shard_bytes: int | None, key: str, task: str | int | None = None, adapter: str = "merge"
) -> Exported:  # fmt: skip
    """Write the folder `to`. The run's adapter, for `task`, is merged into its weights, or kept beside them. key: names `to` in messages.

    Raises:
        UserError: the layout, or `engine` reading it, cannot express the model; `to` is not empty or cannot be made.
    """
    from components.adapters.base import adapter_layers, unwrap
    from framework import build
    from framework.parts import without_adapter
    from framework.signatures import ALLOWED, locate

    config = build.plain(run.cfg.model) | {"vocab_size": run.model.vocab_size}
    spec = getattr(run.model, "rope_spec", None)
    if spec is not None and not spec.plain and layout.rope is None:
        raise UserError(f"rope: layout {layout.name} has no place for the RoPE rule {spec.rule!r} of {run.path}; take rope=none")
    kept, spoken, wrapped = None, {}, [name for name, _ in adapter_layers(run.model)]
    if adapter == "keep":
        if not wrapped:
            raise UserError(f"task.adapter: keep, but {run.path} was trained without an adapter; drop the override")
        if any(layer.merged for _, layer in adapter_layers(run.model)):
            raise UserError("task.adapter: keep, but adapter.merge: true puts the adapter into the weights; drop one of them")
        kept = interop().kept_adapters(build.build(run.cfg.adapter), run.model.cpu().eval(), task)
        spoken = {name: probe_as(widened(run.model), kept.tasks.get(name)) for name in kept.loras}
        unwrap(run.model)
    model = without_adapter(run, None if kept is not None else task).cpu().eval()
    further = [i for i in run.tokenizer.stop_ids if i != run.tokenizer.eot_id]
    extras = {} if layout.rope is None else {"rope": spec, "stops": further, "engine": engine}
    talks = hasattr(locate(run.cfg.data._target_, (*ALLOWED, *run.cfg.allow_targets)), "chat_template")
    template = build.build(run.cfg.data).chat_template if talks else None  # the data may be gone: it is not read
    with new_folder(to, key) as folder:
        try:
            tensors = layout.to_foreign(model.state_dict(), config)
            layout.write(folder, tensors, config, run.tokenizer.eot_id, shard_bytes or interop().SHARD_BYTES, **extras)
        except UserError as error:
            raise UserError(f"{error}{other_layouts(run, layout)}") from error
        if has_template := (folder / interop().CONFIG).is_file():
            interop().write_companions(folder, run.tokenizer, model.vocab_size, template)
        else:
            run.tokenizer.save(folder)
        source = interop().read(folder)
        compare(tensors, source.tensors, str(to))
        numbers = layout.infer(source.tensors, source.about, {key: config[key] for key in layout.asks})
        again = build.build(config | numbers, rope=build.build(run.cfg.rope), path="model")
        if spec is not None:
            again.set_rope((layout.rope and layout.rope(source.about, config | numbers)) or plain_rope(spec))
        again.load_state_dict(layout.from_foreign(source.tensors, numbers))
        check_logits(model, again, to)
        if kept is not None:
            ours = model.state_dict()
            theirs = layout.to_foreign(ours, config)
            names = interop().module_names(wrapped, ours, theirs)
            interop().write_adapters(folder / ADAPTERS, kept, names, theirs, str(to))
            for name, expected in spoken.items():
                adapted = interop().read_back(folder / ADAPTERS, kept, name, names, theirs, copy.deepcopy(again))
                check_close(expected, probe(widened(adapted.eval())), to / ADAPTERS / name)
    told = notes(spec, layout, engine) + ([] if template is None else [wording(has_template)])
    return Exported(len(source.tensors), told, usage(to, layout, engine, spec, list(spoken)))


def other_layouts(run: Run, layout: Any) -> str:
    """The end of a message: further layouts that have models of the run's kind."""
    others = [f"task.format={name}" for name, other in interop().layouts().items() if other.model == layout.model and other is not layout]
    return f"; other layouts of this model: {', '.join(others)}" if others else ""


def plain_rope(spec: Any) -> Any:
    """The RopeSpec of the same positions, not rescaled."""
    regime = replace(spec.regimes[-1], factors=(), attention_factor=1.0)
    return replace(spec, regimes=(regime,), rule="none")


def notes(spec: Any, layout: Any, engine: str) -> list[str]:
    """What the reader will do otherwise than our engine."""
    if spec is None or layout.rope is None or not spec.bounds:
        return []
    length = spec.bounds[0]
    planned = ", never rope.switch=upfront" if spec.switch == "upfront" else ""
    return [
        f"rope: {engine} takes the long table for a whole batch once its longest row has more than {length} tokens, and reads it anew then "
        f"(our rope.switch=recompute{planned}); rows of both kinds belong in different batches there"
    ]


def wording(has_template: bool) -> str:
    """How to ask as a run that words its prompts does. has_template: whether its form of them lies in the folder."""
    if not has_template:
        return "prompts: the run puts what it is asked into a form of its own, for which this layout has no place; ask in that form"
    return (
        "prompts: chat_template.jinja words what a user says as the run does (apply_chat_template, chat requests of vLLM; here prompt= is "
        "too); a text given there without it is asked as it is"
    )


def usage(to: Path, layout: Any, engine: str, spec: Any, beside: list[str]) -> str:
    """What to type next. beside: names of the adapters that lie there."""
    back = f"python generate.py ckpt={to}"
    if beside:
        return f"{interop().adapter_usage(engine, to, to / ADAPTERS / beside[0])}, or here {back} adapter.task={beside[0]}"
    if engine == "vllm":
        length = "" if spec is None or spec.plain else f", max_model_len=N), where N is {spec.original_len} if it is left out"
        return f"vllm.LLM({str(to)!r}{length or ')'}, or here {back}"
    if "transformers" in layout.engines:
        return f"transformers.AutoModelForCausalLM.from_pretrained({str(to)!r}), or here {back}"
    return f"python -m framework.convert {to} --to RUN_DIR imports it again"


def compare(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Raise RuntimeError, a defect of ours, unless every expected tensor is there bit for bit (half precision widened)."""
    import torch

    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name].float(), tensor.float()):
            raise RuntimeError(f"{where}: {name} did not survive the conversion")


def check_logits(model: Any, again: Any, to: Path) -> None:
    """Raise RuntimeError, a defect of ours, unless the model that was read back gives the same logits bit for bit, in each RoPE regime."""
    import torch

    bounds = [getattr(getattr(m, "rope_spec", None), "bounds", ()) for m in (model, again)]
    if bounds[0] != bounds[1] or not all(map(torch.equal, probe(model), probe(again.eval()))):
        raise RuntimeError(f"{to}: the logits differ after reading it back")


def check_close(ours: list[Any], theirs: list[Any], to: Path) -> None:
    """Raise RuntimeError, a defect of ours, unless the logits agree but for the rounding of products that are taken in another order."""
    import torch

    for one, other in zip(ours, theirs, strict=True):
        if not (one - other).abs().max() <= ROUNDINGS * torch.finfo(one.dtype).eps * one.abs().max():
            raise RuntimeError(f"{to}: the logits differ after reading it back")


def widened(model: Any) -> Any:
    """A copy in float32 where the weights are narrower: rounding to bfloat16 would hide what an adapter adds."""
    import torch

    narrow = any(torch.finfo(p.dtype).bits < 32 for p in model.parameters() if p.is_floating_point())
    return copy.deepcopy(model).float() if narrow else model


def probe(model: Any) -> list[Any]:
    """Logits (1, T, V) of a fixed row of tokens, in each RoPE regime."""
    import torch

    from components.contracts import Batch

    ids = torch.arange(PROBE_TOKENS)[None] * 7919 % model.vocab_size
    bounds = getattr(getattr(model, "rope_spec", None), "bounds", ())
    found = []
    for regime in range(len(bounds) + 1):
        batch = Batch(input_ids=ids, rope_regime=torch.tensor([regime], dtype=torch.int8) if bounds else None)
        with torch.no_grad():
            found.append(model.logits(model(batch).hidden))
    return found


def probe_as(model: Any, task: str | None) -> list[Any]:
    """The same with the adapter's `task`, None where it has none."""
    from components.adapters.base import task_ids

    holder = task_ids(model)
    if holder is not None and task is not None:
        holder.set(task)
    return probe(model)


def is_alive(process: int) -> bool:
    """Does a process of this number run on this machine?"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def new_folder(to: Path, key: str) -> Iterator[Path]:
    """A hidden folder beside `to` that takes its name when the block ends well, and is deleted when it does not. key: names it in messages.

    Raises:
        UserError: `to` exists and is not empty, or its parent cannot be written to.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{key}: {str(to)!r} exists and is not empty; choose another name or remove it")
    to = to.resolve()  # a link to an empty folder: the folder is replaced, not the link
    temporary = to.parent / f".{to.name}.{os.getpid()}.tmp"
    for left in to.parent.glob(f".{glob.escape(to.name)}.*.tmp"):  # by a process that was killed
        number = left.name.removeprefix(f".{to.name}.").removesuffix(".tmp")
        if number.isdecimal() and not is_alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{key}: {str(to)!r} cannot be made: {error.strerror or error}") from error
    try:
        yield temporary
        os.replace(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
