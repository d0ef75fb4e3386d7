"""Peak figures of accelerators and clusters of them: dense matmul rates, memory, links, power, as
plain data.

Peaks are the maker's, not what a program reaches. Sources: A100, H100, H200, B200, GB200 and L40S
as in the system files of aiconfigurator-core (Apache-2.0), which follow NVIDIA's data sheets; V100,
B300 and GB300 from NVIDIA's data sheets; TPU as in the JAX scaling book
(jax-ml.github.io/scaling-book/tpus), where an ICI figure is one way per link. The H100 of 96 GB is
the HBM2e part capped at 500 W of torchtitan's published runs. Peak power is the maker's TDP; TPU v4
is the largest chip power in Jouppi et al. 2023 (arXiv 2304.01433). Idle power of a GPU is what its
own meter shows with a context and no work (60-75 W on A100 and H100). None: not published. Sparse
rates are not used."""

import difflib
import math
from dataclasses import dataclass
from typing import Any

GIB = 2**30
TERA = 10**12
GIGA = 10**9


@dataclass(frozen=True)
class Chip:
    """One accelerator. FLOP/s (int8: OP/s), bytes/s, bytes, W; None where it has none or the figure
    is unknown.
    """

    name: str
    peak_bf16_flops: float  # float16 on V100, which has no bfloat16
    peak_fp8_flops: float | None
    peak_int8_ops: float | None
    hbm_bytes: int
    hbm_bandwidth: float
    scale_up_bandwidth: (
        float  # one way per link: NVLink or PCIe port of a GPU, one ICI link of a TPU
    )
    scale_up_links: int  # 1 for a switched network, else the links of the torus (2D: 4, 3D: 6)
    scale_out_bandwidth: float | None  # one way per chip, between nodes
    domain: int  # chips that one scale-up network joins: an NVLink domain, a TPU pod
    idle_power: float | None
    peak_power: float | None
    peak_fp4_flops: float | None = None


def _gpu(
    name: str,
    bf16: int,
    fp8: int | None,
    hbm: int,
    hbm_tb: float,
    up: int,
    out: float,
    watts: int,
    domain: int = 8,
    fp4: int | None = None,
    idle: int = 70,
) -> Chip:
    """Units as data sheets print them: TFLOP/s, GiB, TB/s, GB/s, W."""
    rates = (bf16 * TERA, fp8 * TERA if fp8 else None, None)
    links = (hbm * GIB, round(hbm_tb * 1000) * GIGA, up * GIGA, 1, round(out * GIGA))
    return Chip(name, *rates, *links, domain, idle, watts, fp4 * TERA if fp4 else None)


def _tpu(
    name: str,
    bf16: int,
    int8: int,
    hbm: int,
    hbm_tb: float,
    link: int,
    links: int,
    pod: int,
    watts: int | None = None,
) -> Chip:
    """Units as for `_gpu`; `link` GB/s one way per ICI link, `pod` chips on one torus."""
    hbm_bandwidth = round(hbm_tb * 1000) * GIGA
    return Chip(
        name,
        bf16 * TERA,
        None,
        int8 * TERA,
        hbm * GIB,
        hbm_bandwidth,
        link * GIGA,
        links,
        None,
        pod,
        None,
        watts,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _gpu("v100", 125, None, 32, 0.9, 150, 12.5, 300, idle=40),
        _gpu("v100_16gb", 125, None, 16, 0.9, 150, 12.5, 300, idle=40),
        _gpu("a100", 312, None, 80, 2.04, 300, 25, 400),
        _gpu("a100_40gb", 312, None, 40, 1.555, 300, 25, 400),
        _gpu("h100", 989, 1978, 80, 3.35, 450, 50, 700),
        _gpu("h100_96gb_500w", 989, 1978, 96, 2.4, 450, 50, 500),
        _gpu("h200", 989, 1978, 141, 4.8, 450, 50, 700),
        _gpu("b200", 2250, 4500, 180, 7.7, 900, 100, 1000, fp4=9000),
        _gpu("b300", 2250, 4500, 288, 8.0, 900, 100, 1100, fp4=13500),
        _gpu("gb200", 2500, 5000, 185, 8.0, 900, 100, 1200, domain=72, fp4=10000),
        _gpu("gb300", 2500, 5000, 288, 8.0, 900, 100, 1400, domain=72, fp4=15000),
        _gpu("l40s", 362, 733, 45, 0.86, 32, 50, 350),  # no NVLink: PCIe 4 x16
        _tpu("v4", 275, 275, 32, 1.2, 45, 6, 4096, 192),
        _tpu("v5e", 197, 394, 16, 0.81, 45, 4, 256),
        _tpu("v5p", 459, 918, 96, 2.8, 90, 6, 8960),
        _tpu("v6e", 920, 1840, 32, 1.6, 90, 4, 256),
    )
}

ALIASES = {"a100_80gb": "a100", "h100_80gb": "h100", "v100_32gb": "v100", "trillium": "v6e"}

# jax.Device.device_kind → chip, whole strings only: "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB" and
# MIG slices have other peaks than their namesakes, and a wrong peak gives a wrong MFU.
DEVICE_KINDS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA L40S": "l40s",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip(name: str) -> Chip:
    """The chip called `name` in `CHIPS` or `ALIASES`. Raises ValueError with the closest known
    name.
    """
    name = ALIASES.get(name, name)
    if name in CHIPS:
        return CHIPS[name]
    close = difflib.get_close_matches(name.lower(), CHIPS, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown chip {name!r}: did you mean {close!r}? Known: {', '.join(CHIPS)}")


@dataclass(frozen=True)
class Nodes:
    """`count` equal nodes of `chips` accelerators each; `host_power` W is what a node draws beside
    its chips.
    """

    chip: Chip
    count: int
    chips: int = 8
    host_power: float = (
        1800.0  # CPUs, fans, NICs of an 8-GPU server: 2.2-2.6 kW at low load less eight idle GPUs
    )


MOST_CHIPS = 2**20  # no cluster has more, and plans are enumerated for each


@dataclass(frozen=True)
class Cluster:
    """Groups of equal nodes on one network; more than one group is a cluster of mixed chips."""

    name: str
    groups: tuple[Nodes, ...]

    def __post_init__(self) -> None:
        if not self.groups or any(g.count < 1 or g.chips < 1 for g in self.groups):
            counts = (
                " + ".join(f"{g.count}×{g.chips} {g.chip.name}" for g in self.groups) or "no group"
            )
            raise ValueError(
                f"cluster {self.name!r} has no nodes: {counts}; every group needs ≥ 1 node of ≥ 1 "
                "chip"
            )
        if self.size > MOST_CHIPS:
            counts = " + ".join(f"{g.count}·{g.chips}" for g in self.groups)
            raise ValueError(
                f"cluster {self.name!r} has {counts} = {self.size} chips, more than {MOST_CHIPS}: "
                "name a smaller one"
            )

    @property
    def size(self) -> int:
        """Chips in all."""
        return sum(g.count * g.chips for g in self.groups)

    @property
    def chip(self) -> Chip:
        """The slowest chip: in a synchronous step every other one waits for it."""
        return min((g.chip for g in self.groups), key=lambda c: c.peak_bf16_flops)


def cluster(text: str) -> Cluster:
    """`h100:32x8` (32 nodes of 8 chips), `gb200:4x72`, `v5p:4x4x8` (one torus), mixed as
    `h100:4x8+a100:4x8`.

    A single number is one node of as many chips. Raises ValueError for an unknown chip, a malformed
    or an empty group."""
    return Cluster(text, tuple(_nodes(part, text) for part in text.split("+")))


def _nodes(part: str, text: str) -> Nodes:
    name, _, shape = part.strip().partition(":")
    found = chip(name)
    sides = shape.split("x")
    if not all(side.isdecimal() and side.isascii() and len(side) < 10 for side in sides):
        raise ValueError(
            f"cluster {text!r}: {part!r} is not chip:AxB with whole numbers, such as h100:32x8 or "
            "v5p:4x4x8"
        )
    numbers = [int(side) for side in sides]
    if found.scale_out_bandwidth is None:  # a torus of hosts of four chips
        size = math.prod(numbers)
        per_host = math.gcd(4, size) if size else 4
        return Nodes(found, size // per_host if per_host else 0, per_host, 450.0)
    if len(numbers) > 2:
        raise ValueError(
            f"cluster {text!r}: {part!r} has {len(numbers)} sides; write nodes x chips, h100:32x8"
        )
    count, per_node = (1, *numbers)[-2:]
    return Nodes(found, count, per_node, 1800.0 * per_node / 8)


def detect(device: Any) -> Chip | None:
    """The chip of a `jax.Device` by its device_kind, None when it is not in the table: then no MFU
    can be given.
    """
    name = DEVICE_KINDS.get(device.device_kind)
    return CHIPS[name] if name else None
