"""What the configuration checker says, without any training."""

from collections.abc import Sequence
from typing import Literal

import pytest

from components.contracts import UserError
from framework.build import ConfigErrors, build, compose
from framework.signatures import check_node, fits, locate


class Part:
    def __init__(
        self,
        size: int,
        rate: float = 0.1,
        kind: Literal["slow", "fast"] = "slow",
        names: list[str] | None = None,
        lengths: Sequence[int] = (),
    ) -> None:
        if size > 99:
            raise ValueError("size is too large")


NODE = {"_target_": f"{__name__}.Part", "size": 1}
ALLOWED = (f"{__name__.split('.')[0]}.",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sise": 3}, "part.sise: unknown key of Part; did you mean 'size'?"),
        ({"size": "big"}, "part.size: 'big' is not a whole number"),
        ({"size": True}, "part.size: True is not a whole number"),
        ({"rate": "abc"}, "part.rate: 'abc' is not a number"),
        ({"kind": "fist"}, "part.kind: 'fist' is not one of slow, fast; did you mean 'fast'?"),
        ({"names": "a"}, "part.names: 'a' is not a list of text or null"),
        ({"lengths": 5}, "part.lengths: 5 is not a list of whole numbers, such as [128, 256]"),
        ({"size": None}, "part.size: None is not a whole number"),
    ],
)
def test_each_problem_is_one_line(change, message):
    assert check_node("part", {**NODE, **change}, ALLOWED) == [message]


def test_all_problems_at_once():
    assert len(check_node("part", {**NODE, "sise": 3, "rate": "x", "kind": "y"}, ALLOWED)) == 3


def test_sound_node_passes():
    assert check_node("part", {**NODE, "rate": 1, "kind": "fast", "names": ["a"]}, ALLOWED) == []


def test_targets_outside_the_allow_list_are_refused_before_import():
    with pytest.raises(LookupError, match="not allowed"):
        locate("os.system")
    with pytest.raises(LookupError, match="did you mean 'Linear'"):
        locate("torch.nn.Linaer")


def test_containers_and_unions():
    assert fits([1, 2.5], tuple[float, float]) and not fits(["a"], tuple[float, float])
    assert fits(None, int | None) and not fits(None, int)
    assert fits({"_target_": "x.Y"}, int)


def test_build_turns_constructor_errors_into_one_line():
    with pytest.raises(UserError, match="in_features"):
        build({"_target_": "torch.nn.Linear", "out_features": 3})


def test_build_gives_plain_containers():
    """ListConfig in checkpoints: lists that reach objects are lists."""
    from omegaconf import OmegaConf

    module = build(OmegaConf.create({"_target_": "torch.nn.LayerNorm", "normalized_shape": [2, 3]}))
    assert type(module.normalized_shape) is tuple and type(module.normalized_shape[0]) is int


def test_several_errors_in_one_command_line():
    with pytest.raises(ConfigErrors) as caught:
        compose("train", ["model=sambaa", "optimizer.lrr=3", "trainer.max_steps=ten", "seed=abc"])
    text = "\n".join(caught.value.lines)
    assert len(caught.value.lines) == 4
    for part in ("'samba'", "did you mean 'optimizer.lr'", "trainer.max_steps: 'ten'", "seed: 'abc'"):
        assert part in text


def test_plus_sign_habit_is_explained():
    with pytest.raises(ConfigErrors, match="drop the plus sign"):
        compose("train", ["+model=samba"])


def test_new_keys_of_a_mapping_need_the_plus_sign():
    word = "adapter.experts={v:{r:4,alpha:8,dropout:0}}"
    with pytest.raises(ConfigErrors, match="gives it keys that it does not have yet; add them with a plus sign") as caught:
        compose("train", ["adapter=moe_lora", word])
    assert f"'+{word}'" in str(caught.value)
    assert compose("train", ["adapter=moe_lora", f"+{word}"]).adapter.experts == {"v": {"r": 4, "alpha": 8, "dropout": 0}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.num_heads=5", "model.num_kv_heads=2"], ["model.num_kv_heads", "model.num_heads=5"]),
        (["schedule.warmup_steps=99", "trainer.max_steps=10"], ["schedule.warmup_steps: 99", "trainer.max_steps=10"]),
        (["task=sft"], ["task.loss_on", "data=chat"]),
        (["trainer.accelerator=tpu"], ["trainer.accelerator: 'tpu'", "cpu, gpu"]),
        (["trainer.precision=16-mixed"], ["trainer.precision", "trainer=gpu"]),
        (["model.position=none", "rope=yarn"], ["rope", "model.position=none"]),
        (["data.seq_len=0"], ["data.seq_len: 0", "at least 1"]),
        (["seed=-1"], ["seed: -1"]),
        (["model.vocab_size=64"], ["model.vocab_size: 64", "data.tokenizer.vocab_size"]),
    ],
)
def test_rules_between_keys_name_both_and_the_remedy(overrides, words):
    with pytest.raises(ConfigErrors) as caught:
        compose("train", overrides)
    for word in words:
        assert word in str(caught.value)
