"""Before a sweep starts: turn its words into a plan, and refuse what is wrong with them while nothing has been started or written."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.errors import UserError
from framework.overrides import config_loader, explain, first_line, group_names
from framework.runtime import usable_cpus
from framework.signatures import nearest
from framework.sweep import FLAGS, Sweep, is_free, might_sweep, read_jobs, read_sweep

CHECKED_VALUES = 12  # of each swept key; a range of seeds need not be checked to its end
AT_ONCE, DAY_MINUTES = 2, 1440
EXTRAS = {"joblib": "sweep", "submitit": "slurm", "optuna": "sweep"}


def plan_sweep(config_name: str, words: list[str]) -> Sweep | None:
    """The sweep that these words ask for, begun (its folder exists), or None for a single run.

    Raises:
        UserError: words that no job could use, one line each; a folder that holds another sweep.
    """
    words, resumed = continued(words)
    if not might_sweep(words):
        return None
    typed = [word for word in words if not word.startswith("-")]
    with config_loader():
        try:
            config = GlobalHydra.instance().hydra.compose_config(  # type: ignore[union-attr]
                config_name, list(typed), RunMode.MULTIRUN, from_shell=False, validate_sweep_overrides=False
            )
        except (HydraException, OmegaConfBaseException) as error:
            if not any(flag in words for flag in FLAGS):
                return None  # hydra refuses it again, and that is explained
            raise UserError("\n".join(refusals(config_name, typed, error))) from error
        if not (any(flag in words for flag in FLAGS) or config.hydra.mode == RunMode.MULTIRUN):
            return None
        check_plugins(config)
        parsed = parse([*sampler_words(config), *OmegaConf.to_container(config.hydra.overrides.task)])  # type: ignore[misc]
        planned = grid(parsed) if is_grid(config) else None
    if OmegaConf.select(config, "resume"):
        raise UserError(f"resume: {config.resume!r} is of one run; continue a sweep with resume=SWEEP_DIR alone (it holds sweep.json)")
    check_values(config_name, parsed)
    folder = Path(str(config.hydra.sweep.dir))
    if not resumed and not any(word.startswith("hydra.sweep.dir=") for word in typed):
        folder = fresh(folder)
    swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]
    sweep = Sweep(folder, [], without(typed, "hydra.sweep.dir"), swept, planned)
    given = [*launcher_words(config, typed), *without(typed, "hydra.sweep.dir"), f"hydra.sweep.dir={quote(str(folder))}"]
    if read_sweep(folder):
        check_same(sweep, read_sweep(folder))
        if planned is None:
            from framework.sweep_storage import continue_study

            sweep.first_job = max((job.number + 1 for job in read_jobs(folder) if job.folder), default=0)
            changes = continue_study(config)
            given = [*without(given, *(word.partition("=")[0] for word in changes)), *changes]
    sweep.words = ["-m", *given]
    sweep.begin()
    if "submitit" in str(config.hydra.launcher._target_):
        print(f"what the jobs print is in {folder}/.submitit/", flush=True)
    return sweep


def continued(words: list[str]) -> tuple[list[str], bool]:
    """The words of the sweep that `resume=SWEEP_DIR` names, with what was typed besides; other words as they are.

    Raises:
        UserError: a word that would make the remaining jobs differ from the others.
    """
    named = [word.partition("=")[2].strip("'\"") for word in words if word.startswith("resume=")]
    folder = Path(named[-1]) if named and named[-1] else None
    record = read_sweep(folder) if folder is not None else {}
    if not record:
        return words, False
    extra = [word for word in words if not word.startswith(("resume=", "-"))]
    for word in extra:
        if word not in record["overrides"] and not is_free(word):
            raise UserError(f"resume: {word} would make the remaining jobs of {folder} differ from the others; drop it")
    kept = without(record["overrides"], *(word.lstrip("+~").partition("=")[0] for word in extra))
    return ["-m", *kept, *extra, f"hydra.sweep.dir={quote(str(folder))}"], True


def check_same(sweep: Sweep, record: dict[str, Any]) -> None:
    """A folder continues the sweep that it holds, and no other.

    Raises:
        UserError: it holds another one, or a file behind its words was changed.
    """
    now, before = ({w for w in words if not is_free(w)} for words in (sweep.typed, record["overrides"]))
    if now != before:
        raise UserError(
            f"hydra.sweep.dir: {sweep.folder} holds another sweep ({record['command']}); choose another folder, or continue that one: "
            f"python train.py resume={sweep.folder}"
        )
    jobs = [{w for w in job["overrides"] if not is_free(w)} for job in record["jobs"]]
    if sweep.planned is not None and jobs != [{w for w in words if not is_free(w)} for words in sweep.planned]:
        raise UserError(f"resume: the jobs of {sweep.folder} are others now; a file that its words name was changed. Start a new sweep")


def refusals(config_name: str, typed: list[str], error: Exception) -> list[str]:
    """Lines for the words that no job of a sweep can use: fixed ones first, then every value of the swept ones."""
    missing = re.search(r"hydra/(launcher|sweeper)/(\w+)'", str(error))
    if missing:
        group, option = f"hydra/{missing[1]}", missing[2]
        if (plugin := option.partition("_")[0]) in EXTRAS:
            return [f"{group}: {plugin} is not installed; pip install -e .[{EXTRAS[plugin]}]"]
        options = GlobalHydra.instance().hydra.config_loader.get_group_options(group)  # type: ignore[union-attr]
        return [f"{group}: {option!r} is not an option; one of {', '.join(options)}{nearest(option, options)}"]
    try:
        parsed = parse(typed)
    except HydraException:
        return explain(config_name, typed)[0] or [first_line(error)]
    lines: list[str] = []
    for words in variations(parsed):
        lines += [line for line in explain(config_name, words)[0] if line not in lines]
    return lines or [first_line(error)]


def check_values(config_name: str, parsed: list[Override]) -> None:
    """Refuse what every job would refuse, and single values of swept keys that are wrong. A combination of options that cannot be is left
    to its own job, so that a sweep over all combinations can have holes.

    Raises:
        UserError: every such problem.
    """
    from framework.build import ConfigErrors, compose

    groups, lines, shared = group_names(), [], None
    for changed, words in zip(changed_keys(parsed), variations(parsed)):
        try:
            compose(config_name, words)
            found: list[str] = []
        except ConfigErrors as error:
            found = error.lines
            if error.__cause__ is not None and isinstance(error.__cause__, HydraException):
                lines += [line for line in found if line not in lines]  # refused by hydra: an unknown option or key
        shared = found if shared is None else [line for line in shared if line in found]
        lines += [line for line in found if changed and changed not in groups and line.startswith(f"{changed}:") and line not in lines]
    lines = [*(shared or []), *(line for line in lines if line not in (shared or []))]
    if lines:
        raise UserError("\n".join(lines))


def parse(words: list[str]) -> list[Override]:
    """Words by Hydra's grammar; of two for one key the later counts."""
    loader = GlobalHydra.instance().hydra
    parser = OverridesParser.create(config_loader=loader.config_loader if loader is not None else None)
    return list({override.get_key_element(): override for override in parser.parse_overrides(words)}.values())


def values_of(override: Override) -> list[str]:
    """Every value of a word, as words; of an interval its start."""
    key = override.get_key_element()
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    if override.is_interval_sweep():
        return [f"{key}={override.value().start}"]  # type: ignore[union-attr]
    return [str(override.input_line)]


def variations(parsed: list[Override]) -> list[list[str]]:
    """The first job's words, then the same with each other value of one swept key."""
    values = [values_of(override)[:CHECKED_VALUES] for override in parsed if not override.get_key_element().startswith("hydra")]
    first = [own[0] for own in values]
    return [first, *([*first[:i], word, *first[i + 1 :]] for i, own in enumerate(values) for word in own[1:])]


def changed_keys(parsed: list[Override]) -> list[str | None]:
    """For each of `variations` the key whose value it changes."""
    keys = [o for o in parsed if not o.get_key_element().startswith("hydra")]
    return [None, *(o.get_key_element() for o in keys for _ in values_of(o)[1:CHECKED_VALUES])]


def grid(parsed: list[Override]) -> list[list[str]]:
    """Words of every job of Hydra's own sweeper, in its order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper.split_arguments(parsed, None)[0]


def is_grid(config: DictConfig) -> bool:
    """Is it Hydra's own sweeper, whose jobs are known beforehand?"""
    return str(config.hydra.sweeper._target_).endswith("BasicSweeper")


def sampler_words(config: DictConfig) -> list[str]:
    """`hydra.sweeper.params` as words."""
    params: Any = OmegaConf.select(config, "hydra.sweeper.params")
    resolved: Any = OmegaConf.to_container(params, resolve=True) if params else {}
    return [f"{key}={value}" for key, value in resolved.items()]


def check_plugins(config: DictConfig) -> None:
    """
    Raises:
        UserError: the launcher or sweeper is of a package that is not installed.
    """
    for part in ("launcher", "sweeper"):
        target = str(config.hydra[part]._target_)
        module = ".".join(target.split(".")[:2])
        if target.startswith("hydra_plugins.") and importlib.util.find_spec(module) is None:
            extra = next((extra for name, extra in EXTRAS.items() if name in target), "sweep")
            raise UserError(f"hydra/{part}: {module.partition('.')[2]} is not installed; pip install -e .[{extra}]")


def launcher_words(config: DictConfig, typed: list[str]) -> list[str]:
    """Settings of a launcher that runs jobs side by side: how many at a time, and an equal share of the CPUs for each. Typed words win."""
    launcher, sweeper = config.hydra.launcher, config.hydra.sweeper
    target, at_once, words = str(launcher._target_), 0, []
    if target.endswith("JoblibLauncher"):
        at_once = launcher.n_jobs if any(word.startswith("hydra.launcher.n_jobs=") for word in typed) else AT_ONCE
        words = [f"hydra.launcher.n_jobs={at_once}"]
    elif target.endswith("submitit_launcher.LocalLauncher"):
        words = [f"hydra.launcher.timeout_min={DAY_MINUTES}"]
        at_once = AT_ONCE
        if is_grid(config):  # it starts all jobs of a batch together
            at_once = sweeper.max_batch_size or AT_ONCE
            words.append(f"hydra.sweeper.max_batch_size={at_once}")
    if at_once and "OMP_NUM_THREADS" not in os.environ and "OMP_NUM_THREADS" not in config.hydra.job.env_set:
        cpus = usable_cpus()
        threads = max(1, cpus // (at_once if at_once > 0 else cpus))
        words.append(f"+hydra.job.env_set.OMP_NUM_THREADS='{threads}'")
        print(f"{at_once if at_once > 0 else cpus} jobs at a time, {threads} thread{'s' if threads > 1 else ''} each", flush=True)
    return [word for word in words if not any(t.startswith(word.lstrip("+").partition("=")[0] + "=") for t in typed)]


def fresh(folder: Path) -> Path:
    """The folder, or the next free one where another sweep began in the same second."""
    names = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))]
    return next(name for name in names if not name.exists())


def without(words: list[str], *keys: str) -> list[str]:
    """The words but those for `keys`."""
    return [word for word in words if word.lstrip("+~").partition("=")[0] not in keys]


def quote(text: str) -> str:
    """A value in quotes where Hydra's grammar needs them."""
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("'", "\\'") + "'"
