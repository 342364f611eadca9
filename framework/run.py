"""The two jobs behind the two commands. Imports nothing heavy at the top; Hydra has composed and told us where to write."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from components.errors import UserError
from framework import build, sweep
from framework.inherit import lay_over, take_model
from framework.runs import locked, read_state


def train(config: DictConfig) -> float | None:
    """Train or continue a run; return the optimised metric."""
    run_dir = Path(config.paths.output_dir)
    if config.preflight:
        from framework.preflight import preflight

        preflight(config, run_dir)
        return None
    if config.resume and config.ckpt:
        raise UserError(f"ckpt: {config.ckpt!r} and resume={config.resume!r} exclude each other: a new run, or one continued")
    if sweep.in_sweep():
        work_left, metric = sweep.begin_job(config, run_dir)
        if not work_left:
            return metric
        if (run_dir / "config.yaml").is_file() and read_state(run_dir):
            return resume(config, run_dir)
    if config.resume and read_state(run_dir):
        return resume(config, run_dir)
    if config.resume == "auto":
        print("resume=auto: no unfinished run of this name; starting a new one")
    elif config.resume:
        what = "is not a run (it has no run_state.json)" if Path(config.resume).is_dir() else "is not a directory"
        raise UserError(f"resume: {config.resume!r} {what}; give a run directory such as outputs/NAME/DATE_..., or auto")
    if config.ckpt:
        take_model(config, HydraConfig.get().overrides.task)
    build.check(config)
    return start(config, run_dir, resuming=False)


def start(config: DictConfig, run_dir: Path, resuming: bool) -> float | None:
    """Hand a validated configuration to the training loop."""
    from framework.train import train as run_training

    with locked(run_dir) as free:
        if not free:
            raise UserError(f"resume: another process is training {run_dir}; wait for it, or start a new run")
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
    if state.get("status") == "imported":
        raise UserError(f"resume: {run_dir} was imported, not trained; start from it with ckpt={run_dir}")
    saved = build.read_config(run_dir)
    changed = lay_over(saved, config, HydraConfig.get().overrides.task, run_dir)
    saved.resume_force = config.resume_force
    if changed and not config.resume_force:
        keys = ", ".join(changed)
        raise UserError(f"resume: {keys} would change the numbers of {run_dir}; drop it, or add resume_force=true to continue inexactly")
    if state.get("status") == "done" and is_complete(saved, run_dir, state.get("step", 0)):
        return None
    build.check(saved)
    return start(saved, run_dir, resuming=True)


def is_complete(config: DictConfig, run_dir: Path, step: int) -> bool:
    """Has a finished run nothing left to do? Says so then. step: optimizer steps done; more may be asked for now."""
    from framework.procedure import is_procedure

    steps = int(config.trainer.max_steps)
    if is_procedure(config.task):
        print(f"{run_dir} is finished; nothing to resume. What came out: {run_dir / 'metrics.json'}")
        return True
    if step >= steps:
        print(f"{run_dir} is finished (step {step} of {steps}); nothing to resume. Use it: python generate.py ckpt={run_dir}")
    return step >= steps


def generate(config: DictConfig) -> float | None:
    """Generate from a trained run."""
    if "_target_" in config.rope and config.rope.switch is None:  # another rule, with its own switch where it has one
        with open_dict(config):
            del config.rope.switch
    build.check(config)
    from framework.generate import generate as run_generation

    run_generation(config, Path(config.paths.output_dir))
    return None
