"""What a run takes over from another: everything when it is resumed, model, RoPE rule and tokenizer when it starts from `ckpt=`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from components.errors import UserError
from framework import build
from framework.foreign import CACHE, as_run, is_foreign
from framework.overrides import CONF, group_names
from framework.runs import INHERITED, choices, newest_run, typed_before

# Keys that may change when a run is continued: they do not touch the numbers that it computes.
FREE_ON_RESUME = ("logger", "tags", "samples", "progress", "traceback", "checkpoint", "paths", "optimized_metric", "allow_targets")
ABOUT_RESUME = ("resume", "resume_force", "name")


def lay_over(saved: DictConfig, composed: DictConfig, words: list[str], run: Path) -> list[str]:
    """Copy what was typed now from the composed configuration into the saved one; return what would change the run's numbers.

    Words that began the run, or that choose what it already has, change nothing: one command line both starts a run and requeues it.

    Raises:
        UserError: a choice that only a new run can make.
    """
    changed, before, had = [], choices(run), typed_before(run)
    with open_dict(saved):
        for word in words:
            key, _, value = word.lstrip("+~").partition("=")
            if key in ABOUT_RESUME or word in had or (key in group_names() and before.get(key) == value):
                continue
            if key in group_names() and key not in saved:
                raise UserError(f"resume: {word} is a choice of a new run; {run} goes on with its own")
            typed, kept = build.plain(OmegaConf.select(composed, key)), build.plain(OmegaConf.select(saved, key))
            if key.split(".")[0] not in FREE_ON_RESUME and typed != kept:
                changed.append(word)
            OmegaConf.update(saved, key, typed, merge=False, force_add=True)
    return changed


def take_model(config: DictConfig, words: list[str]) -> None:
    """With `ckpt=`, take model, RoPE rule and tokenizer from that run; refuse words that contradict it.

    The RoPE rule alone may be another: longer rows are trained from the weights of short ones. It starts from the run's `model.max_length`.

    Raises:
        UserError: no such run, or an override of one of them differs from the run's.
    """
    source = resolve_checkpoint(config.ckpt, Path(config.paths.root), Path(config.paths.cache_dir))
    if not (Path(str(config.ckpt)).is_dir() and is_foreign(Path(str(config.ckpt)))):  # what was made of it in the cache may be deleted
        config.ckpt = str(source)
    folder = build.run_folder(source)
    saved, chosen = build.read_config(folder), choices(folder)
    plain = OmegaConf.load(CONF / "rope" / "none.yaml")
    another_rule = config.rope._target_ != plain._target_  # an experiment's choice, which is no word
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if key.split(".")[0] == "rope":
            another_rule = True
            continue
        if key.split(".")[0].split("/")[0] not in INHERITED and not key.startswith("data.tokenizer"):
            continue
        kept: Any = chosen.get(key) if key in group_names() else build.plain(OmegaConf.select(saved, key))
        typed: Any = value if key in group_names() else build.plain(OmegaConf.select(config, key))
        if typed != kept:
            raise UserError(f"{key}: {value!r} contradicts ckpt={config.ckpt}, which has {kept!r}; drop the override")
    with open_dict(config):
        config.model = saved.model
        if not another_rule:
            config.rope = saved.rope
        if "tokenizer" in config.data and "tokenizer" in saved.data:
            config.data.tokenizer = saved.data.tokenizer


def resolve_checkpoint(ckpt: str | None, root: Path, cache_dir: Path = CACHE) -> Path:
    """A `ckpt=` word as a path: RUN_DIR or FILE as given; null, last: the newest run below root; best: its best checkpoint.

    A Hugging Face folder becomes a run in cache_dir.

    Raises:
        UserError: there is no run, no such path, or a Hugging Face folder that cannot be read.
    """
    if ckpt not in (None, "last", "best"):
        path = Path(str(ckpt))
        if not path.exists():
            raise UserError(f"ckpt: {ckpt!r} does not exist; give a run directory, a checkpoint file, a Hugging Face folder, last or best")
        return as_run(path, cache_dir)
    found = newest_run(root, trained=True)
    if found is None:
        raise UserError(f"no trained run under {root}/; train one first: python train.py")
    if ckpt == "best":
        from framework.checkpoint import best_checkpoint

        found = best_checkpoint(found)
    if ckpt is not None:
        print(f"ckpt={ckpt}: {found}", file=sys.stderr)
    return found
