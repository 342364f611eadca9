"""Convert: a checkpoint of another project into a run directory that `ckpt=` takes, or a run directory into a checkpoint of theirs.

Nothing appears under the given name before it was read back and compared: an import is written back and must give every tensor bit for bit,
an export is imported again and must give the same logits bit for bit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from components.errors import UserError

EXAMPLES = """examples:
  python -m framework.convert iter-9500-ckpt.pth --to outputs/imported --tokenizer tokenizer.json model.num_heads=12 model.window=2048
  python -m framework.convert path/to/hugging_face_folder --to outputs/imported
  python -m framework.convert outputs/NAME/DATE_... --to exported --format transformers"""
IMPORTED = "imported"  # name and status of a run that was not trained here
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


def detect(tensors: dict[str, Any], path: Path) -> Any:
    """The one layout whose names these are. Raises UserError when none or several are."""
    known = interop().layouts()
    fitting = [layout for layout in known.values() if layout.matches(tensors)]
    if len(fitting) != 1:
        raise UserError(f"{path}: layout not recognised (first tensor: {next(iter(tensors))}); add --from {'|'.join(sorted(known))}")
    return fitting[0]


def import_checkpoint(path: Path, to: Path, name: str, tokenizer: Path | None, eot: str | None, words: list[str]) -> str:
    """Write the run directory `to`; returns the line to end with.

    Args:
        name: of a layout, or "auto".
        tokenizer: a tokenizer.json; None for the one beside the checkpoint.
        eot: its token that ends a text, when that is not <|endoftext|>.
        words: model.KEY=VALUE, for what the checkpoint does not say.

    Raises:
        UserError: unreadable, of another layout or other sizes, something missing, or `to` is not empty.
    """
    from framework import build

    source = interop().read(path)
    layout = detect(source.tensors, path) if name == "auto" else layout_named(name, "--from")
    numbers = layout.infer(source.tensors, source.about, given_numbers(words))
    state = layout.from_foreign(source.tensors, numbers)
    file = tokenizer or source.tokenizer
    if file is None:
        raise UserError(f"{path}: no tokenizer.json beside it; add --tokenizer FILE")
    with new_folder(to) as folder:
        own = own_tokenizer(file, eot)
        rows = numbers["vocab_size"]
        if own.vocab_size > rows:
            grown = -(-own.vocab_size // build.HEAD_MULTIPLE) * build.HEAD_MULTIPLE
            print(
                f"vocabulary: {grown - rows} rows added to the {rows}, since the tokenizer has {own.vocab_size} ids with our special tokens"
            )
            state, numbers = interop().grow_vocabulary(state, grown), numbers | {"vocab_size": grown}
        own.save(folder / "tokenizer")
        write_run(folder, layout.model, configuration(layout, numbers, to), state)
        run = build.load_run(folder)
        written = layout.undo(first_rows(run.model.state_dict(), rows), numbers | {"vocab_size": rows})
        compare(written, layout.canonical(source.tensors), str(path))
    weights = sum(tensor.numel() for tensor in run.model.parameters())
    return f"{to}: {weights / 1e6:.1f}M parameters of layout {layout.name}. Next: python generate.py ckpt={to} prompt='...'"


def given_numbers(words: list[str]) -> dict[str, Any]:
    """The words model.KEY=VALUE as a dict. Raises UserError for any other word."""
    from omegaconf import OmegaConf

    if wrong := [word for word in words if not word.startswith("model.") or "=" not in word]:
        raise UserError(f"{wrong[0]}: not understood; only model.KEY=VALUE may follow the options")
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    except Exception as error:  # YAML has many ways to be broken
        raise UserError(f"{' '.join(words)}: not understood ({str(error).splitlines()[0]})") from error
    return dict(given.get("model", {})) if isinstance(given, dict) else {}


def configuration(layout: Any, numbers: dict[str, Any], to: Path) -> Any:
    """The configuration of the run: defaults but for the model's numbers and the tokenizer. Raises UserError for an unknown key."""
    from framework import build

    words = [f"model.{key}={json.dumps(value)}" for key, value in numbers.items()]
    where = json.dumps(str(to.absolute() / "tokenizer"), ensure_ascii=False)
    config = build.compose(
        "train", [f"model={layout.model}", *words, "data.tokenizer.kind=hf", f"data.tokenizer.path={where}", f"name={IMPORTED}"]
    )
    config.paths.output_dir = str(to)
    return config


def write_run(folder: Path, model: str, config: Any, state: dict[str, Any]) -> None:
    """Write config.yaml, the one checkpoint (step 0) and run_state.json, as a run has them. model: option that the configuration chose."""
    from omegaconf import OmegaConf

    from framework import runtime
    from framework.checkpoint import FOLDER, AtomicCheckpointIO, checkpoint_name
    from framework.logging import masked
    from framework.runs import replace_file, write_state

    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "config.yaml", OmegaConf.to_yaml(masked(OmegaConf.to_container(config, resolve=True))))
    name = checkpoint_name(0)
    content = {"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}, "global_step": 0}
    AtomicCheckpointIO().save_checkpoint(content, folder / FOLDER / name)
    write_state(
        folder, name=config.name, seed=config.seed, status=IMPORTED, created=datetime.datetime.now(datetime.UTC).isoformat(), step=0,
        tokens=0, last_checkpoint=name, choices={"model": model, "model/size": IMPORTED},
        versions=runtime.versions(), git=runtime.git_state(),
    )  # fmt: skip


def own_tokenizer(file: Path, eot: str | None) -> Any:
    """Load a foreign tokenizer.json; its token `eot` becomes our end of text, so that the row trained for it is used.

    Raises:
        UserError: no tokenizer, or no such special token.
    """
    from components.data.tokenizers import EOT, FILE_NAME, Tokenizer

    if eot is None or eot == EOT:
        return Tokenizer.load(file)
    file = file / FILE_NAME if file.is_dir() else file
    Tokenizer.load(file)  # for its messages
    content = json.loads(file.read_text(encoding="utf-8"))
    specials = {token["content"]: token for token in content["added_tokens"] if token.get("special")}
    if eot not in specials or EOT in specials:
        reason = f"has {EOT} already" if EOT in specials else f"has the special tokens {', '.join(specials) or 'none'}"
        raise UserError(f"--eot: {eot!r} cannot be the end of text: {file} {reason}")
    specials[eot]["content"] = EOT
    content["post_processor"] = None  # would put the old name round every text; texts are framed here by the data
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict) and eot in vocabulary:
        vocabulary[EOT] = vocabulary.pop(eot)
    elif isinstance(vocabulary, list):
        content["model"]["vocab"] = [[EOT if piece == eot else piece, score] for piece, score in vocabulary]
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_str(json.dumps(content)))


def first_rows(state: dict[str, Any], rows: int) -> dict[str, Any]:
    """The state without the rows that were added to embedding and head."""
    return {name: tensor[:rows] if name in ("embed_tokens.weight", "lm_head.weight") else tensor for name, tensor in state.items()}


def compare(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Raise RuntimeError, a defect of ours, unless every expected tensor is there bit for bit (half precision widened)."""
    import torch

    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name].float(), tensor.float()):
            raise RuntimeError(f"{where}: {name} did not survive the conversion")


def export_run(path: Path, to: Path, name: str, shard_bytes: int) -> str:
    """Write the folder `to` in the layout `name`; returns the line to end with.

    An adapter is merged into the weights. Raises UserError when `path` is no run, or the layout cannot express its model.
    """
    from framework import build
    from framework.parts import without_adapter

    layout = layout_named(name, "--format")
    run = build.load_run(path)
    config = build.plain(run.cfg.model) | {"vocab_size": run.model.vocab_size}
    wanted = build.compose("train", [f"model={layout.model}", "model/size=test"]).model._target_
    if config["_target_"] != wanted:
        raise UserError(f"--format: {name} holds models of {wanted}; {path} is a {config['_target_']}")
    spec = getattr(run.model, "rope_spec", None)
    if spec is not None and (spec.factors or spec.attention_factor != 1.0):
        raise UserError(f"--format: {name} has no place for the RoPE rule {spec.rule!r} of {path}")
    model = without_adapter(run)
    with new_folder(to) as folder:
        tensors = layout.to_foreign(model.state_dict(), config)
        layout.write(folder, tensors, config, run.tokenizer.eot_id, shard_bytes)
        run.tokenizer.save(folder)
        source = interop().read(folder)
        compare(tensors, source.tensors, str(to))
        numbers = layout.infer(source.tensors, source.about, {key: config[key] for key in layout.asks})
        check_logits(run, model, config | numbers, layout.from_foreign(source.tensors, numbers), to)
    back = f"python -m framework.convert {to} --to RUN_DIR"
    return f"{to}: {len(source.tensors)} tensors in layout {name}, read back with equal logits. To import it again: {back}"


def check_logits(run: Any, model: Any, numbers: dict[str, Any], state: dict[str, Any], to: Path) -> None:
    """Raise RuntimeError, a defect of ours, unless a model built from what was read back gives the same logits bit for bit."""
    import torch

    from components.contracts import Batch
    from framework import build

    again = build.build({**numbers}, rope=build.build(run.cfg.rope), path="model")
    again.load_state_dict(state)
    again.eval()
    ids = torch.arange(PROBE_TOKENS)[None] * 7919 % model.vocab_size
    with torch.no_grad():
        ours, theirs = (m.logits(m(Batch(input_ids=ids)).hidden) for m in (model, again))
    if not torch.equal(ours, theirs):
        raise RuntimeError(f"{to}: the logits differ after reading it back")


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A hidden folder beside `to` that takes its name when the block ends well, and is deleted when it does not.

    Raises:
        UserError: `to` exists and is not empty, or its parent cannot be written to.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to: {str(to)!r} exists and is not empty; choose another name or remove it")
    temporary = to.absolute().parent / f".{to.absolute().name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--to: {str(to)!r} cannot be made: {error.strerror or error}") from error
    try:
        yield temporary
        os.replace(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 converted, 2 not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m framework.convert", description=(__doc__ or "").split(": ", 1)[1], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint file or folder of another project; with --format a run of ours")
    parser.add_argument("words", metavar="model.KEY=VALUE", nargs="*", help="numbers of the model that the checkpoint does not hold")
    parser.add_argument("--to", metavar="DIR", required=True, help="the folder to write; new or empty")
    parser.add_argument("--from", dest="layout", metavar="LAYOUT", default="auto", help="layout of SOURCE; auto tells it from the names")
    parser.add_argument("--format", metavar="LAYOUT", help="write the run SOURCE in this layout")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="tokenizer.json of SOURCE, when it is not beside it")
    parser.add_argument("--eot", metavar="TOKEN", help="its token that ends a text, such as </s>, when that is not <|endoftext|>")
    parser.add_argument("--shard-bytes", metavar="N", type=int, help="write files of at most this size")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    words = parser.parse_intermixed_args(argv)
    from framework.entry import leave_quietly, report

    try:
        if words.format is None:
            line = import_checkpoint(Path(words.source), Path(words.to), words.layout, words.tokenizer, words.eot, words.words)
        else:
            if words.words or words.tokenizer or words.eot or words.layout != "auto":
                raise UserError("--format: a run says everything itself; --from, --tokenizer, --eot and model.KEY=VALUE are for imports")
            line = export_run(Path(words.source), Path(words.to), words.format, words.shard_bytes or interop().SHARD_BYTES)
        print(line)
    except BrokenPipeError:
        return leave_quietly()
    except (Exception, KeyboardInterrupt) as error:
        return report(error, words.traceback)
    return 0


if __name__ == "__main__":
    sys.exit(main())
