"""The floors against the published arithmetic for one H200 at B=8 L=4096 D=3072 N=16, and attention's pairs against counting them."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.train_samba import floor_shape

H200 = roofline.card_named("NVIDIA H200")
SHAPE = (8, 4096, 3072, 16)


def test_scan_moves_the_bytes_of_the_table():
    forward, backward = roofline.scan_bytes(*SHAPE)
    assert forward == pytest.approx(0.91e9, rel=0.01)
    assert backward == pytest.approx(1.9e9, rel=0.01)


def test_scan_floor_is_that_of_the_table():
    forward, backward = roofline.scan_floor(H200, *SHAPE)
    for floor, memory, exp, fp32 in ((forward, 0.21, 0.39, 0.24), (backward, 0.44, 0.39, 0.7)):
        assert floor.memory == pytest.approx(memory, abs=0.006)
        assert floor.exp == pytest.approx(exp, abs=0.006)
        assert floor.fp32 == pytest.approx(fp32, abs=0.03)  # the table rounds the backward's to one digit
    assert forward.ms == forward.exp and backward.ms == backward.fp32  # neither is bound by memory
    assert forward.ms + backward.ms == pytest.approx(1.1, abs=0.05)


def test_other_ops_take_the_published_times():
    conv = roofline.traffic_floor(H200, *roofline.conv_bytes(8, 4096, 3072))
    assert [round(floor.ms, 2) for floor in conv] == [0.09, 0.14]
    assert roofline.add_norm_bytes(32768, 1536)[0] == pytest.approx(0.60e9, rel=0.01)
    assert roofline.swiglu_bytes(32768, 4096) == pytest.approx((0.81e9, 1.34e9), rel=0.01)
    assert roofline.attention_flops(8, 12, 4096, 128, 2048)[0] == pytest.approx(309e9, rel=0.002)
    assert roofline.attention_floor(H200, 8, 12, 12, 4096, 128, 2048)[0].ms == pytest.approx(0.39, abs=0.005)


def test_a_training_step_of_421m_allows_about_240k_tokens_a_second():
    ms = roofline.samba_step_ms(H200, 8, 4096, **floor_shape("421m"), parameters=421_793_280)
    microseconds = {name: 1e3 * value / 32768 for name, value in ms.items()}
    assert microseconds["matmul"] + microseconds["attention"] == pytest.approx(3.46, abs=0.02)
    assert microseconds["scan"] == pytest.approx(0.20, abs=0.01)
    assert microseconds["swiglu"] == pytest.approx(0.18, abs=0.01)
    assert microseconds["conv"] == pytest.approx(0.04, abs=0.005)
    assert 1e6 / sum(microseconds.values()) == pytest.approx(240e3, rel=0.03)


@pytest.mark.parametrize(("length", "window"), [(7, 3), (7, 7), (7, 20), (7, None), (1, 1)])
def test_window_pairs_are_those_of_the_mask(length, window):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    assert roofline.window_pairs(length, window) == int(seen.sum())


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    ],
)
def test_cards_are_told_apart_by_the_name_that_torch_gives(name, card):
    assert roofline.card_named(name).name == card


def test_an_unknown_card_has_no_floor():
    assert roofline.card_named("NVIDIA GeForce GTX 1080") is None
    assert roofline.card_found(torch.device("cpu")) is None
