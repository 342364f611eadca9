"""Convert: a checkpoint of another project into a run directory that `ckpt=` takes, or a run directory into a checkpoint of theirs.

Nothing appears under the given name before it was read back and compared: an import is written back and must give every tensor bit for bit,
an export is imported again and must give the same logits bit for bit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.errors import UserError
from framework.export import compare, export, interop, layout_for, layout_named, new_folder

EXAMPLES = """examples:
  python -m framework.convert iter-9500-ckpt.pth --to outputs/imported --tokenizer tokenizer.json model.num_heads=12 model.window=2048
  python -m framework.convert path/to/hugging_face_folder --to outputs/imported
  python -m framework.convert outputs/NAME/DATE_... --to exported --format transformers"""
IMPORTED = "imported"  # name and status of a run that was not trained here


@dataclass(frozen=True)
class Imported:
    """layout: name of the one it was in; parameters: of the model."""

    layout: str
    parameters: int


def by_hand(path: Path) -> str:
    """The beginning of a command that says what a checkpoint does not."""
    return f"import it with python -m framework.convert {path} --to RUN_DIR"


def detect(tensors: dict[str, Any], path: Path) -> Any:
    """The one layout whose names these are. Raises UserError when none or several are."""
    known = interop().layouts()
    fitting = [layout for layout in known.values() if layout.matches(tensors)]
    if len(fitting) != 1:
        first, names = next(iter(tensors), "none"), "|".join(sorted(known))
        raise UserError(f"{path}: layout not recognised (first tensor: {first}); {by_hand(path)} --from {names}")
    return fitting[0]


def import_checkpoint(path: Path, to: Path, name: str, tokenizer: Path | None, eot: str | None, words: list[str], key: str) -> Imported:
    """Write the run directory `to`.

    Args:
        name: of a layout, or "auto".
        tokenizer: a tokenizer.json; None for the one beside the checkpoint.
        eot: its token that ends a text, when that is neither <|endoftext|> nor named by a tokenizer_config.json beside the tokenizer.
        words: model.KEY=VALUE, for what the checkpoint does not say.
        key: names `to` in messages.

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
        raise UserError(f"{path}: no tokenizer.json beside it; put it there, or {by_hand(path)} --tokenizer FILE")
    if "auto_map" in source.about:
        print(f"{path}: config.json names code of its own (auto_map), which is never run", file=sys.stderr)
    with new_folder(to, key) as folder:
        own = own_tokenizer(file, eot)
        rows = numbers["vocab_size"]
        if own.vocab_size > rows:
            grown = -(-own.vocab_size // build.HEAD_MULTIPLE) * build.HEAD_MULTIPLE
            why = f"since the tokenizer has {own.vocab_size} ids with our special tokens"
            print(f"vocabulary: {grown - rows} rows added to the {rows}, {why}", file=sys.stderr)
            state, numbers = interop().grow_vocabulary(state, grown), numbers | {"vocab_size": grown}
        own.save(folder / "tokenizer")
        spec = layout.rope(source.about, numbers) if layout.rope is not None else None
        config = configuration(layout, numbers, to, [*rope_words(spec), *data_words(file)])
        write_run(folder, layout.model, config, state, "none" if spec is None else spec.rule)
        run = build.load_run(folder)
        written = layout.undo(first_rows(run.model.state_dict(), rows), numbers | {"vocab_size": rows})
        compare(written, layout.canonical(source.tensors), str(path))
    return Imported(layout.name, sum(tensor.numel() for tensor in run.model.parameters()))


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


def rope_words(spec: Any) -> list[str]:
    """The RoPE rule of a checkpoint as words, its tables as they are. spec: a RopeSpec, None for plain RoPE.

    A file has one attention factor for rows of any length; where its tables are equal, so that a row never changes, one is kept.
    """
    if spec is None:
        return []
    ones = (1.0,) * (spec.rotary_dim // 2)  # which () stands for
    long, short = spec.factors or ones, spec.regimes[0].factors or None
    values = {"factor": spec.target_len / spec.original_len, "factors": long, "short_factors": short}
    if spec.attention_factor == 1.0:
        values["attention_factor.policy"] = "none"
    else:
        values |= {"attention_factor.policy": "both", "attention_factor.value": spec.attention_factor}
    if not spec.bounds:
        values["switch"] = "always_long"
    return [f"rope={spec.rule}", *(f"rope.{key}={json.dumps(value)}" for key, value in values.items())]


def data_words(tokenizer: Path) -> list[str]:
    """The data option as words where the chat template beside the tokenizer is one's own, so that a prompt is the user's turn."""
    from framework.entry import as_text

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    option, asked = interop().data_option(file), interop().prompt_template(file)
    if asked is not None:  # no row with an input is ever read, so that its template stays the option's
        return [f"data={option}", "data.tasks={unknown: {path: unknown}}", f"data.template.without_input={as_text(asked)}"]
    return [] if option is None else [f"data={option}", "data.path=unknown"]


def configuration(layout: Any, numbers: dict[str, Any], to: Path, words: list[str]) -> Any:
    """The configuration of the run: defaults but for the model's numbers, RoPE rule, data and tokenizer.

    words: of RoPE rule and data. Raises UserError for an unknown key.
    """
    from framework import build

    words = [*words]
    words += [f"model.{key}={json.dumps(value)}" for key, value in numbers.items()]
    where = json.dumps(str(to.absolute() / "tokenizer"), ensure_ascii=False)
    config = build.compose(
        "train", [f"model={layout.model}", *words, "data.tokenizer.kind=hf", f"data.tokenizer.path={where}", f"name={IMPORTED}"]
    )
    config.paths.output_dir = str(to)
    return config


def write_run(folder: Path, model: str, config: Any, state: dict[str, Any], rope: str = "none") -> None:
    """Write config.yaml, the one checkpoint (step 0) and run_state.json, as a run has them. model, rope: options of the configuration."""
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
        tokens=0, last_checkpoint=name, choices={"model": model, "model/size": IMPORTED, "rope": rope},
        versions=runtime.versions(), git=runtime.git_state(),
    )  # fmt: skip


def own_tokenizer(file: Path, eot: str | None) -> Any:
    """Load a foreign tokenizer.json; its token `eot` becomes our end of text, so that the row trained for it is used.

    eot: None for <|endoftext|>, or, where the tokenizer has no such token, for the one that a tokenizer_config.json beside it names.

    Raises:
        UserError: no tokenizer, or no such special token.
    """
    from components.data.tokenizers import EOT, FILE_NAME, Tokenizer, stops_beside

    file = file / FILE_NAME if file.is_dir() else file
    own = Tokenizer.load(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    specials = {token["content"]: token for token in content.get("added_tokens") or [] if token.get("special")}
    if eot is None and EOT not in specials and (named := interop().named_end(file)) in specials:
        eot = named
    if eot is None or eot == EOT:
        return own
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

    return Tokenizer(Backend.from_str(json.dumps(content)), stops_beside(file))


def first_rows(state: dict[str, Any], rows: int) -> dict[str, Any]:
    """The state without the rows that were added to embedding and head."""
    return {name: tensor[:rows] if name in ("embed_tokens.weight", "lm_head.weight") else tensor for name, tensor in state.items()}


def export_run(path: Path, to: Path, name: str, shard_bytes: int | None) -> str:
    """Write the run `path` as the folder `to` in the layout `name`; returns the line to end with. Raises UserError as `export`."""
    from framework import build

    layout_named(name, "--format")
    run = build.load_run(path)
    layout = layout_for(run, name, "transformers", "--format")
    done = export(run, to, layout, "transformers", shard_bytes, "--to")
    for line in done.notes:
        print(line, file=sys.stderr)
    back = f"python -m framework.convert {to} --to RUN_DIR"
    return f"{to}: {done.tensors} tensors in layout {name}, read back with equal logits. To import it again: {back}"


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
    parser.add_argument("--eot", metavar="TOKEN", help="its token that ends a text, such as </s>, when no file beside it says so")
    parser.add_argument("--shard-bytes", metavar="N", type=int, help="write files of at most this size")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    words = parser.parse_intermixed_args(argv)
    from framework.entry import leave_quietly, report

    try:
        if words.format is None:
            to = Path(words.to)
            done = import_checkpoint(Path(words.source), to, words.layout, words.tokenizer, words.eot, words.words, "--to")
            size = f"{done.parameters / 1e6:.1f}M parameters of layout {done.layout}"
            line = f"{to}: {size}. Next: python generate.py ckpt={to} prompt='...'"
        else:
            if words.words or words.tokenizer or words.eot or words.layout != "auto":
                raise UserError("--format: a run says everything itself; --from, --tokenizer, --eot and model.KEY=VALUE are for imports")
            line = export_run(Path(words.source), Path(words.to), words.format, words.shard_bytes)
        print(line)
    except BrokenPipeError:
        return leave_quietly()
    except (Exception, KeyboardInterrupt) as error:
        return report(error, words.traceback)
    return 0


if __name__ == "__main__":
    sys.exit(main())
