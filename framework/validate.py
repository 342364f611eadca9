"""What a configuration must fulfil beyond each class's own signature: types of run-level keys and rules between keys.

A rule takes the resolved configuration (plain containers) and returns lines; each names both keys, their values and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from framework.resolvers import task_names
from framework.signatures import check_targets, describe, fits, locate, nearest


@dataclass
class Compile:
    enabled: bool
    backend: Literal["inductor", "aot_eager", "eager"]
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass
class Ema:
    enabled: bool
    decay: float


@dataclass
class Checkpoint:
    every_steps: int
    keep_last: int
    keep_best: int


@dataclass
class Validate:
    every_steps: int
    at_start: bool


@dataclass
class Samples:
    every_steps: int
    prompt: str | None
    max_new_tokens: int


@dataclass
class Stop:
    train_loss_below: float | None
    steps: int


@dataclass
class Progress:
    every_seconds: float


@dataclass
class Paths:
    root: str
    output_dir: str
    cache_dir: str


RUN_KEYS: dict[str, Any] = {
    "seed": int,
    "name": str | int | float,
    "tags": list[str],
    "ckpt": str | None,
    "adapter_from": str | None,
    "resume": str | None,
    "resume_force": bool,
    "optimized_metric": str,
    "on_error": Literal["skip", "raise"],
    "allow_targets": list[str],
    "preflight": bool,
    "traceback": bool,
    "gradient_checkpointing": bool,
    "compile": Compile,
    "ema": Ema,
    "checkpoint": Checkpoint,
    "validate": Validate,
    "samples": Samples,
    "stop": Stop,
    "progress": Progress,
    "paths": Paths,
}


def problems(config: dict[str, Any]) -> list[str]:
    """Every problem of a resolved training configuration, one line each; [] when it is sound."""
    found = list(check_run_keys(config)) + check_targets(config)
    if not found and "trainer" in config:  # rules may rely on the types; they are about training
        found = [line for rule in RULES for line in rule(config)]
    return found


def check_run_keys(config: dict[str, Any]) -> Iterator[str]:
    """Types of the keys that belong to no class."""
    for key, hint in RUN_KEYS.items():
        if key not in config:
            continue
        if not hasattr(hint, "__dataclass_fields__"):
            if not fits(config[key], hint):
                yield f"{key}: {config[key]!r} is not {describe(hint)}"
            continue
        hints, node = get_type_hints(hint), config[key]
        if not isinstance(node, dict):
            yield f"{key}: {node!r} is not a mapping; its keys are {', '.join(hints)}"
            continue
        for name, value in node.items():
            if name not in hints:
                yield f"{key}.{name}: unknown key{nearest(name, hints)}"
            elif not fits(value, hints[name]):
                yield f"{key}.{name}: {value!r} is not {describe(hints[name])}"


def counts_are_positive(config: dict[str, Any]) -> Iterator[str]:
    """Sizes and counts that must be at least 1."""
    keys = {
        "model": ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size", "window"),
        "data": ("seq_len", "batch_size"),
        "trainer": ("max_steps", "accumulate_grad_batches", "log_every_n_steps"),
        "checkpoint": ("every_steps", "keep_last"),
        "validate": ("every_steps",),
        "stop": ("steps",),
        "samples": ("max_new_tokens",),
    }
    for group, names in keys.items():
        for name in names:
            value = (config.get(group) or {}).get(name)
            if isinstance(value, (int, float)) and value < 1:
                yield f"{group}.{name}: {value} is too small; at least 1"


def seed_in_range(config: dict[str, Any]) -> Iterator[str]:
    if not 0 <= config["seed"] < 2**32:
        yield f"seed: {config['seed']} is out of range; 0 to 4294967295"


def ema_decay(config: dict[str, Any]) -> Iterator[str]:
    if not 0 < config["ema"]["decay"] < 1:
        yield f"ema.decay: {config['ema']['decay']} is out of range; above 0 and below 1"


def heads_divide(config: dict[str, Any]) -> Iterator[str]:
    model = config["model"]
    heads, groups, hidden = model.get("num_heads"), model.get("num_kv_heads"), model.get("hidden_size")
    if heads and groups and heads % groups:
        yield f"model.num_kv_heads: {groups} does not divide model.num_heads={heads}; every key/value head serves equally many query heads"
    if heads and hidden and model.get("head_dim") is None and hidden % heads:
        yield f"model.num_heads: {heads} does not divide model.hidden_size={hidden}; choose a divisor or set model.head_dim"


def vocabulary_holds_tokenizer(config: dict[str, Any]) -> Iterator[str]:
    size, tokenizer = config["model"].get("vocab_size"), config["data"].get("tokenizer") or {}
    needed = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) and tokenizer.get("kind") == "bpe" else None
    if size and needed and size < needed:
        yield f"model.vocab_size: {size} is below data.tokenizer.vocab_size={needed}; use null to follow the tokenizer"


def warmup_fits(config: dict[str, Any]) -> Iterator[str]:
    warmup, steps = (config.get("schedule") or {}).get("warmup_steps"), config["trainer"].get("max_steps")
    if warmup and steps and warmup > steps:
        yield f"schedule.warmup_steps: {warmup} is above trainer.max_steps={steps}; lower it or train longer"


def completions_are_marked(config: dict[str, Any]) -> Iterator[str]:
    if config["task"].get("loss_on") == "completion" and "loss_on" not in config["data"]:
        yield "task.loss_on: 'completion' needs data that marks completions, and this data option does not; use data=chat, or task=pretrain"


def pairs_are_compared(config: dict[str, Any]) -> Iterator[str]:
    """Of what is trained; a procedure may read any data."""
    takes, has = (getattr(locate(config[part]["_target_"], ("",)), key, None) for part, key in (("task", "takes_pairs"), ("data", "pairs")))
    if takes and not has:
        yield "task: compares two answers to a prompt, and this data option holds no such pairs; use data=preference data.path=FILE.jsonl"
    if has and takes is False:
        yield "data: holds pairs of answers, which this task cannot compare; use task=dpo with it, or another data option"


def reference_is_named(config: dict[str, Any]) -> Iterator[str]:
    if "reference" in config["task"] and config["task"]["reference"] is None:
        yield "ckpt: null; this task starts from a trained run and is held near it; write ckpt=RUN_DIR, or ckpt=last"


def tasks_are_those_of_the_data(config: dict[str, Any]) -> Iterator[str]:
    """Their order gives the ids, so the lists must be the same."""
    tasks, names = (config["adapter"] or {}).get("tasks"), task_names(config["data"])
    if not isinstance(tasks, list) or tasks == names:
        return
    if "tasks" not in config["data"]:
        yield f"adapter.tasks: {', '.join(map(str, tasks))}, but this data option has no tasks; use data=multitask, or drop the override"
    else:
        yield f"adapter.tasks: {', '.join(map(str, tasks))}, but those of the data are {', '.join(names)}, in this order; drop the override"


def position_uses_rope(config: dict[str, Any]) -> Iterator[str]:
    rule = str((config.get("rope") or {}).get("_target_", ""))
    if config["model"].get("position") == "none" and "factor" in (config.get("rope") or {}):
        yield f"rope: {rule.rpartition('.')[2]} rescales a rotary embedding that model.position=none leaves out; use rope=none"


def precision_fits(config: dict[str, Any]) -> Iterator[str]:
    trainer = config["trainer"]
    allowed = ("32-true", "bf16-mixed", "bf16-true", "64-true", "16-mixed")
    if str(trainer.get("precision")) not in (*allowed, "32"):
        yield f"trainer.precision: {trainer['precision']!r} is not one of {', '.join(allowed)}{nearest(str(trainer['precision']), allowed)}"
    elif trainer.get("accelerator") == "cpu" and str(trainer.get("precision")).startswith("16"):
        yield "trainer.precision: '16-mixed' needs trainer=gpu; on a CPU use bf16-mixed or 32-true"


def accelerator_is_there(config: dict[str, Any]) -> Iterator[str]:
    accelerator, known = str(config["trainer"].get("accelerator")), ("cpu", "gpu", "cuda", "mps", "auto")
    if accelerator not in known:
        yield f"trainer.accelerator: {accelerator!r} is not one of {', '.join(known)}{nearest(accelerator, known)}"
    if accelerator in ("gpu", "cuda"):
        import torch

        if not torch.cuda.is_available():
            yield f"trainer.accelerator: {accelerator!r} but no CUDA device was found; use trainer=cpu"


def claim_is_sound(config: dict[str, Any]) -> Iterator[str]:
    if config.get("claim"):
        from framework.arms import problems as claim_problems

        yield from claim_problems(config["claim"])


RULES: tuple[Callable[[dict[str, Any]], Iterator[str]], ...] = (
    counts_are_positive,
    seed_in_range,
    ema_decay,
    heads_divide,
    vocabulary_holds_tokenizer,
    warmup_fits,
    completions_are_marked,
    pairs_are_compared,
    reference_is_named,
    tasks_are_those_of_the_data,
    position_uses_rope,
    precision_fits,
    accelerator_is_there,
    claim_is_sound,
)
