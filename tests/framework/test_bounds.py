"""Claims of bounds, worked out by hand; verdicts through run folders."""

import json

import pytest

from components.contracts import UserError
from framework import bounds, claims
from framework.arms import problems, read_claim
from framework.claims import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, judge, section
from tests.framework.test_claims import CLAIM, write_job

# arm new: a 1, 2, 6; b 4, 4, 4. arm old: a 3, 6, 6.
VALUES = {("new", "a"): [1.0, 2.0, 6.0], ("new", "b"): [4.0, 4.0, 4.0], ("old", "a"): [3.0, 6.0, 6.0]}
VALUES[("far", "a")] = [10.0, 10.0, 10.0]


def value(arm, seed, metric):
    return VALUES[(arm, metric)][seed - 1] if (arm, metric) in VALUES else None


@pytest.mark.parametrize(
    ("line", "figure"),
    [
        ({"statistic": "min"}, 1.0),
        ({"statistic": "max"}, 6.0),
        ({"statistic": "mean"}, 3.0),
        ({"statistic": "median"}, 2.0),
        ({"statistic": "max", "minus": "b"}, 2.0),
        ({"statistic": "min", "minus": "b"}, -3.0),
        ({"statistic": "median", "over": "old"}, 3.0),  # 3/1, 6/2, 6/6
        ({"statistic": "min", "over": "old"}, 1.0),
        ({"statistic": "max", "arm": ["new", "old"]}, 4.0),  # 3 - 1, 6 - 2, 6 - 6
        ({"statistic": "min", "arm": ["far", "new"], "over": ["old", "new"]}, 0.0),  # 2/9, 4/8, 0/4
        ({"statistic": "max", "arm": ["far", "new"], "over": ["old", "new"]}, 0.5),
    ],
)
def test_figures_by_hand(line, figure):
    line = {"arm": "new", "metric": "a", **line}
    for bound, above in ((figure, True), (figure + 1e-9, False)):
        assert bounds.check({**line, "at_least": bound}, [1, 2, 3], value)["holds"] is above
    for bound, below in ((figure, True), (figure - 1e-9, False)):
        assert bounds.check({**line, "at_most": bound}, [1, 2, 3], value)["holds"] is below


def test_a_missing_value_is_a_fault():
    checked = bounds.check({"arm": "old", "metric": "b", "statistic": "min", "at_least": 0}, [1], value)
    assert "holds" not in checked and checked["fault"] == "b of old seed 1 is not there to take"


BOUNDED = {key: CLAIM[key] for key in ("statement", "metric", "arms", "seeds", "budget_minutes")} | {"test": "bounds"}
BELOW = {"arm": "new", "metric": "val/bits_per_byte", "statistic": "max", "at_most": 1.7}


def sweep(folder, require, seeds=(1, 2, 3), **more):
    claim = {**BOUNDED, "require": require, **more}
    for arm, values in (("new", [1.5, 1.6, 1.7]), ("old", [3.0, 3.2, 3.4])):
        for seed, bits in enumerate(values, 1):
            if seed in seeds:
                write_job(folder, seed + (10 if arm == "old" else 0), arm, seed, bits, claim=claim)
    return folder


def test_verdicts(tmp_path):
    ratio = {"arm": "new", "over": "old", "metric": "val/bits_per_byte", "statistic": "min", "at_least": 2.0}
    verdict = judge(sweep(tmp_path / "a", [BELOW, ratio], show=["val/bits_per_byte"]))
    assert verdict["verdict"] == SUPPORTED and [c["figure"] for c in verdict["comparisons"]] == pytest.approx([1.7, 2.0])
    assert verdict["figures"] == {"new": {"val/bits_per_byte": [1.5, 1.6, 1.7]}, "old": {"val/bits_per_byte": [3.0, 3.2, 3.4]}}
    assert json.loads((tmp_path / "a" / "verdict.json").read_text()) == verdict
    text = section(verdict)
    assert "max of val/bits_per_byte, new: 1.7 (by seed 1.5, 1.6, 1.7), at most 1.7 claimed: holds" in text
    assert "| old | 3.2 [3, 3.4] |" in text
    assert judge(sweep(tmp_path / "b", [BELOW, {**ratio, "at_least": 2.1}]))["verdict"] == NOT_SUPPORTED
    assert judge(sweep(tmp_path / "c", [BELOW], seeds=(1, 3)))["verdict"] == INCONCLUSIVE
    absent = judge(sweep(tmp_path / "d", [{**BELOW, "metric": "val/none"}]))
    assert absent["verdict"] == INCONCLUSIVE and "val/none of new seed 1 is not there to take" in absent["why"][0]


def test_one_arm_can_keep_bounds_and_its_table_has_a_row_a_metric(tmp_path):
    """Comparing needs two arms; figures of one can be bounded, and it may show many of them."""
    verdict = judge(sweep(tmp_path, [BELOW], arms={"new": CLAIM["arms"]["new"]}, show=["val/bits_per_byte", "val/none"]))
    assert verdict["verdict"] == SUPPORTED and verdict["jobs"]["other"] == 3
    assert "| metric | new |\n| --- | --- |\n| val/bits_per_byte | 1.6 [1.5, 1.7] |\n| val/none |  |" in section(verdict)
    assert list(problems({**BOUNDED, "require": [BELOW], "arms": {}})) == ["claim.arms: no value given"]


def test_the_command_prints_every_bound(tmp_path, capsys):
    assert claims.main([str(sweep(tmp_path, [BELOW]))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("SUPPORTED: new beats old") and "at most 1.7 claimed: holds" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**BELOW, "arm": "nwe"}, "claim.require[0].arm: 'nwe' is not one of new, old; did you mean 'new'?"),
        ({**BELOW, "statistic": "medain"}, "did you mean 'median'?"),
        ({**BELOW, "at_least": 1}, "claim.require[0]: needs one of at_least and at_most, a number"),
        ({k: v for k, v in BELOW.items() if k != "at_most"}, "claim.require[0]: needs one of at_least and at_most, a number"),
        ({**BELOW, "minus": "a", "over": "old"}, "minus excludes over, and a list of arms"),
        ({**BELOW, "atmost": 3}, "claim.require[0].atmost: unknown key; did you mean 'at_most'?"),
        ({"arm": "new", "at_most": 1}, "claim.require[0].metric: no value given"),
        (3, "claim.require[0]: 3 is not a mapping"),
        ({**BELOW, "statistic": ["min"]}, "claim.require[0].statistic: ['min'] is not a word"),
        ({**BELOW, "arm": ["new", "odl"]}, "claim.require[0].arm: 'odl' is not one of new, old; did you mean 'old'?"),
        ({**BELOW, "arm": ["new", "old"], "minus": "a"}, "minus excludes over, and a list of arms"),
        ({**BELOW, "arm": ["new"]}, "claim.require[0].arm: ['new'] is not a word"),
        ({**BELOW, "over": None}, "claim.require[0].over: None is not a word"),
    ],
)
def test_bad_lines(line, message):
    assert any(message in found for found in problems({**BOUNDED, "require": [line]}))


def test_require_belongs_to_bounds_and_threshold_to_the_others():
    assert list(problems({**BOUNDED, "require": [BELOW]})) == []
    assert list(problems(BOUNDED)) == ["claim.require: no value given"]
    with pytest.raises(UserError, match=r"claim\.threshold: no value given"):
        read_claim({**CLAIM, "threshold": None})
