"""The two jobs behind the two commands. Imports nothing heavy at the top; Hydra has composed and told us where to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from components.contracts import UserError
from framework import build
from framework.runs import newest_run, read_state

# Keys that may change when a run is continued: they do not touch the numbers that it computes.
FREE_ON_RESUME = ("logger", "tags", "samples", "progress", "traceback", "checkpoint", "paths", "optimized_metric", "allow_targets")


def train(config: DictConfig) -> float | None:
    """Train or continue a run; return the optimised metric."""
    run_dir = Path(config.paths.output_dir)
    if config.resume and config.ckpt:
        raise UserError(f"ckpt: {config.ckpt!r} and resume={config.resume!r} exclude each other: a new run, or one continued")
    if config.resume and read_state(run_dir):
        return resume(config, run_dir)
    if config.resume == "auto":
        print("resume=auto: no unfinished run of this name; starting a new one")
    elif config.resume:
        what = "is not a run (it has no run_state.json)" if Path(config.resume).is_dir() else "is not a directory"
        raise UserError(f"resume: {config.resume!r} {what}; give a run directory such as outputs/NAME/DATE_..., or auto")
    if config.ckpt:
        inherit(config)
    build.check(config)
    return start(config, run_dir, resuming=False)


def start(config: DictConfig, run_dir: Path, resuming: bool) -> float | None:
    """Hand a validated configuration to the training loop."""
    from framework.train import train as run_training

    metrics = run_training(config, run_dir, resuming)
    wanted = config.optimized_metric
    if wanted not in metrics:
        raise UserError(f"optimized_metric: {wanted!r} was not measured; one of {', '.join(sorted(metrics))}")
    return metrics[wanted]


def resume(config: DictConfig, run_dir: Path) -> float | None:
    """Continue a run with its own configuration plus the overrides typed now."""
    state = read_state(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"resume: {str(run_dir)!r} stopped before it had a configuration; start it again")
    saved = build.read_config(run_dir)
    changed = lay_over(saved, config, HydraConfig.get().overrides.task)
    if changed and not config.resume_force:
        keys = ", ".join(changed)
        raise UserError(f"resume: {keys} would change the numbers of {run_dir}; drop it, or add resume_force=true to continue inexactly")
    step, steps = state.get("step", 0), int(saved.trainer.max_steps)
    if state.get("status") == "done" and step >= steps:
        print(f"{run_dir} is finished (step {step} of {steps}); nothing to resume. Use it: python generate.py ckpt={run_dir}")
        return None
    build.check(saved)
    return start(saved, run_dir, resuming=True)


def lay_over(saved: DictConfig, composed: DictConfig, overrides: list[str]) -> list[str]:
    """Copy what was typed now from the composed configuration into the saved one; return the keys whose change is not harmless."""
    changed = []
    with open_dict(saved):
        for word in overrides:
            key = word.lstrip("+~").partition("=")[0].replace("/", ".")
            if key in ("resume", "resume_force", "name"):
                continue
            typed, before = build.plain(OmegaConf.select(composed, key)), build.plain(OmegaConf.select(saved, key))
            if key.split(".")[0] not in FREE_ON_RESUME and typed != before:
                changed.append(key if isinstance(typed, dict) else f"{key}={typed}")
            OmegaConf.update(saved, key, typed, merge=False, force_add=True)
    return changed


def inherit(config: DictConfig) -> None:
    """With `ckpt=`, take model, RoPE rule and tokenizer from that run; refuse words that contradict it.

    Raises:
        UserError: no such run, or an override of one of them differs from the run's.
    """
    config.ckpt = str(resolve_checkpoint(config.ckpt, Path(config.paths.root)))
    folder = build.run_folder(Path(config.ckpt))
    saved = build.read_config(folder)
    for word in HydraConfig.get().overrides.task:
        key = word.lstrip("+~").partition("=")[0].replace("/", ".")
        if key.split(".")[0] not in ("model", "rope") and not key.startswith("data.tokenizer"):
            continue
        typed, kept = OmegaConf.select(config, key), OmegaConf.select(saved, key)
        if build.plain(typed) != build.plain(kept) and not (OmegaConf.is_config(typed) and typed.get("_target_") == kept.get("_target_")):
            raise UserError(f"{key}: {word.partition('=')[2]!r} contradicts ckpt={config.ckpt} ({short(kept)}); drop the override")
    with open_dict(config):
        config.model, config.rope = saved.model, saved.rope
        if "tokenizer" in config.data and "tokenizer" in saved.data:
            config.data.tokenizer = saved.data.tokenizer


def short(value: Any) -> Any:
    return value.get("_target_", "another value") if OmegaConf.is_config(value) else repr(value)


def resolve_checkpoint(ckpt: str | None, root: Path) -> Path:
    """A `ckpt=` word as a path: RUN_DIR or FILE as given; null, last: the newest run below root; best: its best checkpoint.

    Raises:
        UserError: there is no run, or no such path.
    """
    if ckpt not in (None, "last", "best"):
        path = Path(str(ckpt))
        if not path.exists():
            raise UserError(f"ckpt: {ckpt!r} does not exist; give a run directory, a checkpoint file, last or best")
        return path
    found = newest_run(root, trained=True)
    if found is None:
        raise UserError(f"no trained run under {root}/; train one first: python train.py")
    if ckpt == "best":
        from framework.checkpoint import best_checkpoint

        return best_checkpoint(found)
    return found


def generate(config: DictConfig) -> float | None:
    """Generate from a trained run."""
    build.check(config)
    from framework.generate import generate as run_generation

    run_generation(config, Path(config.paths.output_dir))
    return None
