"""Every command that the README and the help texts show is accepted, and the Python example runs."""

import re
import shlex

import pytest
from commands import ROOT

from framework.build import ConfigErrors, compose
from framework.entry import quoted

README = (ROOT / "README.md").read_text()
SOURCES = [README, (ROOT / "conf/train.yaml").read_text(), (ROOT / "conf/generate.yaml").read_text()]
PLACEHOLDERS = ("foo",)  # an option that the reader is about to write
COMMANDS = sorted({m[0].split("  ")[0].strip() for text in SOURCES for m in re.finditer(r"python (train|generate)\.py( [^`\n#]*|$)", text)})


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.endswith(PLACEHOLDERS)])
def test_command_is_accepted(command):
    words = shlex.split(command)[1:]
    script, words = words[0].removesuffix(".py"), [quoted(w) for w in words[1:] if "=" in w]
    free = [re.sub(r"\{.*\}|\[.*\]|\".*\"", "", w) for w in words if not w.startswith(("prompt", "data.path"))]
    if any("," in w for w in free):  # a sweep: each value on its own
        words = [w.split(",")[0] for w in words]
    try:
        compose(script, words)
    except ConfigErrors as error:
        raise AssertionError(f"{command}: {error}") from error


def test_targets_by_role_and_by_regex_arrive_as_they_are_shown():
    shown = [shlex.split(command)[1:] for command in COMMANDS if "adapter.targets=" in command]
    targets = [compose("train", [word for word in words if word.startswith(("adapter", "model"))]).adapter.targets for words in shown]
    assert sorted(targets) == [r".*\.(qkv_proj|o_proj)", "role:qkv,o"]


def test_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(example, scope)
    assert scope["model"].vocab_size == 320


def test_every_option_is_in_the_readme():
    from framework.overrides import group_options

    for group in ("model", "rope", "optimizer", "adapter", "schedule", "data", "decode", "executor"):
        for option in group_options(group):
            assert re.search(rf"\b{option}\b", README), f"{group}={option} is not in the README"
