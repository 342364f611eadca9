"""`python -m framework.stages EXPERIMENT [WORDS]`: all stages of an experiment, one after the other, and its verdict; see `--help`.

An experiment that goes on from the runs of others names them: `stages: {NAME: ???}` takes their folders, `made_by: {NAME: EXPERIMENT}` says
which experiments make them.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

import yaml

from components.errors import UserError
from framework.overrides import CONF
from framework.signatures import nearest

EXAMPLES = """examples:
  python -m framework.stages EXPERIMENT                               every stage, then the claim
  python -m framework.stages EXPERIMENT base=multirun/A/DATE          the first one is there already
  python -m framework.stages EXPERIMENT -- hydra/launcher=joblib      words behind -- go to every stage"""


def made_by(experiment: str) -> dict[str, str]:
    """The earlier stages of an experiment in order, {name: experiment that makes it}. Raises UserError for an unknown one."""
    known = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
    if experiment not in known:
        raise UserError(f"{experiment!r} is no experiment{nearest(experiment, known)}; conf/experiment/ holds {len(known)}")
    return yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text()).get("made_by") or {}


def commands(experiment: str, have: dict[str, str], words: list[str], date: str) -> list[tuple[str, Path, list[str]]]:
    """(stage, its folder, words of train.py) of what is to be run, in order. have: {stage: folder} of what is there.

    Raises UserError for an experiment without stages, and a stage that it has not.
    """
    stages = made_by(experiment)
    if not stages:
        raise UserError(f"experiment {experiment} has no earlier stages; run it with: python train.py experiment={experiment}")
    for name in have:
        if name not in stages:
            raise UserError(f"{name}={have[name]}: the stages of {experiment} are {', '.join(stages)}{nearest(name, stages)}")
    folders, found = dict(have), []
    for name, maker in [*stages.items(), (experiment, experiment)]:
        if name in have:
            continue
        folder = Path("multirun") / maker / date
        given = [f"stages.{stage}={folders[stage]}" for stage in made_by(maker)]
        found.append((name, folder, [f"experiment={maker}", f"hydra.sweep.dir={folder}", *given, *words]))
        folders[name] = str(folder)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: that of the first stage that fails, else that of the claim."""
    parser = argparse.ArgumentParser(
        prog="python -m framework.stages", description="Run all stages of an experiment, one after the other, and judge its claim.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("experiment", help="the last stage: a file of conf/experiment with `made_by`")
    parser.add_argument("have", nargs="*", metavar="STAGE=DIR", help="stages that are there already")
    parser.add_argument("--dry-run", action="store_true", help="only show the commands")
    argv = sys.argv[1:] if argv is None else argv
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    given = parser.parse_args(own)
    try:
        if wrong := [word for word in given.have if "=" not in word]:
            raise UserError(f"{wrong[0]}: not understood; give STAGE=DIR, and words for train.py behind --")
        have = dict(word.split("=", 1) for word in given.have)
        todo = commands(given.experiment, have, words, datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, folder, line in todo:
        print(f"stage {name}: python train.py {' '.join(line)}", flush=True)
        if given.dry_run:
            continue
        if code := subprocess.run([sys.executable, "train.py", *line], cwd=CONF.parent).returncode:
            done = " ".join(f"{stage}={where}" for stage, where in have.items())
            print(f"stage {name} failed; finish it: python train.py resume={folder}", file=sys.stderr)
            print(f"then: python -m framework.stages {given.experiment} {done} {name}={folder}".rstrip(), file=sys.stderr)
            return code
        have[name] = str(folder)
    judge = [sys.executable, "-m", "framework.claims", str(todo[-1][1])]
    print(f"verdict: python {' '.join(judge[1:])}", flush=True)
    return 0 if given.dry_run else subprocess.run(judge, cwd=CONF.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
