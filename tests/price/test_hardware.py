"""The chip table: known names, closest match, and no guess for a device that is not in it."""

from types import SimpleNamespace

import jax
import pytest

from fdp.price import hardware

pytestmark = pytest.mark.fast


def test_units_are_flops_bytes_and_bytes_per_second():
    h100 = hardware.chip("h100")
    assert (h100.peak_bf16_flops, h100.peak_fp8_flops, h100.peak_int8_ops) == (
        989e12,
        1978e12,
        None,
    )
    assert (h100.hbm_bytes, h100.hbm_bandwidth) == (80 * 2**30, 3.35e12)
    assert (h100.scale_up_bandwidth, h100.scale_up_links, h100.scale_out_bandwidth) == (
        450e9,
        1,
        50e9,
    )
    v5p = hardware.chip("v5p")
    assert (v5p.peak_bf16_flops, v5p.peak_fp8_flops, v5p.peak_int8_ops) == (459e12, None, 918e12)
    assert (v5p.hbm_bytes, v5p.hbm_bandwidth) == (96 * 2**30, 2.8e12)
    assert (v5p.scale_up_bandwidth, v5p.scale_up_links, v5p.scale_out_bandwidth) == (90e9, 6, None)


@pytest.mark.parametrize(
    ("name", "close"), [("h1000", "h100"), ("V5P", "v5p"), ("gb-200", "gb200"), ("v5", "v5")]
)
def test_unknown_name_offers_the_closest(name, close):
    with pytest.raises(
        ValueError,
        match=rf"unknown chip '{name}': did you mean '{close}.*Known: v100, .*a100, .*h100",
    ):
        hardware.chip(name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
    ],
)
def test_detect_by_device_kind(kind, name):
    assert hardware.detect(SimpleNamespace(device_kind=kind)) is hardware.chip(name)


@pytest.mark.parametrize(
    "kind",
    ["cpu", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB", ""],
)
def test_detect_does_not_guess(kind):
    assert hardware.detect(SimpleNamespace(device_kind=kind)) is None


def test_this_machine_is_not_in_the_table():
    assert hardware.detect(jax.devices()[0]) is None


def test_a_cluster_is_nodes_times_chips_and_may_mix_chips():
    h100 = hardware.cluster("h100:32x8")
    assert (h100.size, h100.groups[0].count, h100.groups[0].chips) == (256, 32, 8)
    assert hardware.cluster("h100:8").groups[0].count == 1
    assert hardware.cluster("v5p:4x4x8").size == 128
    for torus, hosts in (("v5e:1x6", (3, 2)), ("v5e:3x3", (9, 1)), ("v5p:2x2x2", (2, 4))):
        group = hardware.cluster(torus).groups[0]
        assert (group.count, group.chips) == hosts, torus
    mixed = hardware.cluster("h100:4x8+a100:2x8")
    assert (mixed.size, mixed.chip.name) == (48, "a100")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100:0x8", "has no nodes: 0×8 h100"),
        ("h10:4x8", "unknown chip 'h10': did you mean 'h100'"),
        ("h100:4xx8", "is not chip:AxB with whole numbers"),
        ("h100", "is not chip:AxB"),
        ("h100:2x4x8", "has 3 sides; write nodes x chips"),
    ],
)
def test_a_malformed_cluster_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        hardware.cluster(text)


def test_every_chip_states_power_or_none():
    for chip in hardware.CHIPS.values():
        assert chip.peak_power is None or chip.peak_power > (chip.idle_power or 0)
        assert chip.domain >= 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100:12500000x8", r"has 12500000·8 = 100000000 chips, more than 1048576: name a smaller"),
        ("h100:²x8", "is not chip:AxB with whole numbers"),
        ("h100:" + "9" * 5000, "is not chip:AxB with whole numbers"),
    ],
)
def test_a_cluster_that_no_one_has_is_refused_at_once(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        hardware.cluster(text)
