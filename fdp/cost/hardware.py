"""Peak figures of accelerators: dense matmul rates, memory, links. Peaks are the maker's, not what a program reaches.

Sources: A100, H100, H200, B200, GB200 and L40S as in the system files of aiconfigurator-core (Apache-2.0), which follow
NVIDIA's data sheets; TPU as in the JAX scaling book (jax-ml.github.io/scaling-book/tpus), where an ICI figure is one
way per link. Sparse rates are not used.
"""

import difflib
from dataclasses import dataclass
from typing import Any

GIB = 2**30
TERA = 10**12
GIGA = 10**9


@dataclass(frozen=True)
class Chip:
    """One accelerator. FLOP/s (int8: OP/s), bytes/s, bytes; None where it has none or the figure is unknown."""

    name: str
    peak_bf16_flops: float
    peak_fp8_flops: float | None
    peak_int8_ops: float | None
    hbm_bytes: int
    hbm_bandwidth: float
    scale_up_bandwidth: float  # one way per link: NVLink or PCIe port of a GPU, one ICI link of a TPU
    scale_up_links: int  # 1 for a switched network, else the links of the torus (2D: 4, 3D: 6)
    scale_out_bandwidth: float | None  # one way per chip, between nodes


def _gpu(name: str, bf16: int, fp8: int | None, hbm: int, hbm_tb: float, up: int, out: int) -> Chip:
    """Units as data sheets print them: TFLOP/s, GiB, TB/s, GB/s."""
    rates = (bf16 * TERA, fp8 * TERA if fp8 else None, None)
    return Chip(name, *rates, hbm * GIB, round(hbm_tb * 1000) * GIGA, up * GIGA, 1, out * GIGA)


def _tpu(name: str, bf16: int, int8: int, hbm: int, hbm_tb: float, link: int, links: int) -> Chip:
    """Units as for `_gpu`; `link` GB/s one way per ICI link."""
    rates = (bf16 * TERA, None, int8 * TERA)
    return Chip(name, *rates, hbm * GIB, round(hbm_tb * 1000) * GIGA, link * GIGA, links, None)


CHIPS = {
    chip.name: chip
    for chip in (
        _gpu("a100", 312, None, 80, 2.04, 300, 25),
        _gpu("h100", 989, 1978, 80, 3.35, 450, 50),
        _gpu("h200", 989, 1978, 141, 4.8, 450, 50),
        _gpu("b200", 2250, 4500, 180, 7.7, 900, 100),
        _gpu("gb200", 2500, 5000, 185, 8.0, 900, 100),  # 72 chips share one NVLink domain
        _gpu("l40s", 362, 733, 45, 0.86, 32, 50),  # no NVLink: PCIe 4 x16
        _tpu("v5e", 197, 394, 16, 0.81, 45, 4),
        _tpu("v5p", 459, 918, 96, 2.8, 90, 6),
        _tpu("v6e", 920, 1840, 32, 1.6, 90, 4),
    )
}

# jax.Device.device_kind → chip, whole strings only: "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB" and MIG slices have
# other peaks than their namesakes, and a wrong peak gives a wrong MFU.
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
    """The chip called `name` in `CHIPS`. Raises ValueError with the closest known name."""
    if name in CHIPS:
        return CHIPS[name]
    close = difflib.get_close_matches(name.lower(), CHIPS, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown chip {name!r}: did you mean {close!r}? Known: {', '.join(CHIPS)}")


def detect(device: Any) -> Chip | None:
    """The chip of a `jax.Device` by its device_kind, None when it is not in the table: then no MFU can be given."""
    name = DEVICE_KINDS.get(device.device_kind)
    return CHIPS[name] if name else None
