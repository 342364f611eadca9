"""What train.py and generate.py share: run a Hydra application from a list of words and turn every outcome into an exit code.

0 done; 2 errors that the user can mend (one line each, no traceback); 130 / 143 interrupted by SIGINT / SIGTERM; 1 a defect of ours.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from framework import resolvers, sweep
from framework.runs import STATE_FILE

resolvers.register()  # here, because a launcher's processes import this module and not the entry points

Job = Callable[[DictConfig], Any]
FLAGS = ("-m", "--multirun")  # hydra's parser wants them before the overrides
FREE_TEXT = ("prompt", "samples.prompt")  # keys whose value is a person's text, taken as it is typed


OWN = Path(__file__).resolve().parent.parent
as_python_does = warnings.formatwarning


def in_one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning of ours is for the user: what it says, without the place in the source."""
    own = category is UserWarning and Path(filename).is_relative_to(OWN) and ".venv" not in Path(filename).relative_to(OWN).parts
    return f"warning: {message}\n" if own else as_python_does(message, category, filename, lineno, line)


warnings.formatwarning = in_one_line


class Outcome:
    """Exit code of the job that ran in this process; in a sweep the last failure."""

    code = 0


def run_app(application: Callable[[], Any], config_name: str, argv: list[str] | None) -> int:
    """Run a `@hydra.main` function on the words `argv` (default: the command line) and return the exit code."""
    words = sorted((quoted(word) for word in (sys.argv[1:] if argv is None else argv)), key=lambda word: word in FLAGS, reverse=True)
    from framework.sweep_plan import plan_sweep

    try:
        plan = plan_sweep(config_name, words) if config_name == "train" else None
    except Exception as error:
        return report(error, show_traceback="traceback=true" in words)
    if plan is None:
        return run_words(application, config_name, words)
    return plan.finish(run_words(application, config_name, plan.words))


def run_words(application: Callable[[], Any], config_name: str, words: list[str]) -> int:
    """Run a `@hydra.main` function on words that are ready for Hydra and return the exit code."""
    saved, previous = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"{config_name}.py", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises instead of printing and exiting
    Outcome.code = 0
    try:
        application()
    except SystemExit as stop:  # argparse: --help, unknown flags
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        if Outcome.code < 128:  # else a job of a sweep was, and said so
            print("interrupted", file=sys.stderr)
        return max(Outcome.code, 130)
    except sweep.JobFailed:
        return 1
    except BrokenPipeError:
        return leave_quietly()
    except (HydraException, OmegaConfBaseException) as error:
        return report_composition(config_name, words, error)
    except Exception as error:
        return report(error, show_traceback="traceback=true" in words)
    finally:
        HydraConfig.instance().cfg = None  # hydra leaves it behind, and what runs next in this process would believe it
        sys.argv = saved
        if previous is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = previous
    return Outcome.code


def leave_quietly() -> int:
    """Send what is still buffered nowhere; returns the exit code of a process that SIGPIPE ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def quoted(word: str) -> str:
    """Quote the value of a free-text key for Hydra's grammar, so that commas, brackets and equal signs need no care."""
    key, _, value = word.partition("=")
    if key not in FREE_TEXT or value == "null" or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return word
    return f"{key}={as_text(value)}"


def as_text(value: str) -> str:
    """A value quoted for Hydra's grammar."""
    value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)  # backslashes count only before a quote
    return f"'{value.replace('${', chr(92) + '${')}'"


def run_job(job: Job, config: DictConfig) -> Any:
    """Run one job inside Hydra. The error is reported here, so that Hydra adds nothing; in a sweep it is also written down."""
    try:
        return job(config)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        Outcome.code = leave_quietly()
        return None
    except (Exception, KeyboardInterrupt) as error:
        Outcome.code = report(error, bool(config.get("traceback")))
        if sweep.in_sweep():
            sweep.end_failed_job(config, error, Outcome.code)
        else:
            remove_empty_run()
        return None


def report(error: BaseException, show_traceback: bool = False) -> int:
    """Print an error the way its kind deserves; return its exit code."""
    lines, code = describe(error)
    if code == 1 or show_traceback:
        traceback.print_exception(error)
    for line in lines:
        print(f"error: {line}" if code == 2 else line, file=sys.stderr)
    return code


def describe(error: BaseException) -> tuple[list[str], int]:
    """Lines and exit code of an error."""
    from components.errors import UserError
    from framework.runtime import Interrupted

    if isinstance(error, Interrupted):
        return str(error).splitlines(), 128 + error.signal
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted"], 130
    if isinstance(error, UserError):
        return str(error).splitlines(), 2
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return [f"{error.filename or 'disk'}: no space left on device; free some, then resume (finished checkpoints are intact)"], 2
    if isinstance(error, PermissionError):
        return [f"{error.filename}: permission denied"], 2
    if type(error).__name__ == "MisconfigurationException":  # Lightning: settings of the trainer that exclude each other
        return [f"trainer: {' '.join(str(error).split())}"], 2
    if type(error).__name__ == "OutOfMemoryError":
        return ["out of memory; lower data.batch_size or data.seq_len, or set gradient_checkpointing=true"], 2
    return [], 1


def report_composition(config_name: str, words: list[str], error: Exception) -> int:
    """A command line that Hydra refused: one line for each word that is wrong."""
    from framework.build import all_problems

    lines = all_problems(config_name, [w for w in words if not w.startswith("-")], error)
    if "traceback=true" in words:
        traceback.print_exception(error)
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 2


def remove_empty_run() -> None:
    """Delete the folder that Hydra made for a job that failed before it became a run."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    leftovers = {".hydra", ".hydra_resume", ".lock", "train.log", "generate.log"}
    if folder.is_dir() and not (folder / STATE_FILE).exists() and {p.name for p in folder.iterdir()} <= leftovers:
        shutil.rmtree(folder, ignore_errors=True)
