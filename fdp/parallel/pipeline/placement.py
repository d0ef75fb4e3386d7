"""Where the virtual stages of a pipeline live.

A model is cut into V virtual stages that follow each other; every device holds v of them, its
chunks, in the order of the model.

Legend: p devices, v chunks of a device, V = p·v virtual stages, u one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class Placement:
    """Virtual stage u is on device `devices[u]`. Chunk c of a device is its c-th virtual stage.

    Raises ValueError unless the devices are 0..p−1 and each holds as many virtual stages."""

    devices: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = [self.devices.count(i) for i in range(max(self.devices, default=-1) + 1)]
        if not counts or min(self.devices) < 0 or min(counts) != max(counts):
            raise ValueError(
                f"virtual stages per device: {counts} of devices {list(self.devices)}: each of "
                "0..p−1 must hold the same number, at least one"
            )

    @property
    def p(self) -> int:
        return max(self.devices) + 1

    @property
    def v(self) -> int:
        return len(self.devices) // self.p

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """[p][v]: the virtual stage of chunk c of device i."""
        on = enumerate(self.devices)
        found: list[list[int]] = [[] for _ in range(self.p)]
        for u, i in on:
            found[i].append(u)
        return tuple(map(tuple, found))

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """[V]: which chunk of its device a virtual stage is."""
        return tuple(self.stages[i].index(u) for u, i in enumerate(self.devices))

    def transfers(self, skips: Sequence[tuple[int, int]] = (), relayed: bool = False) -> int:
        """Messages of one microbatch, forwards and backwards.

        skips: pairs of virtual stages, the second reads what the first has kept, as in a U-ViT.
        One message a skip between two devices, or, relayed, one for each boundary between devices
        on its way."""
        cut = [a != b for a, b in pairwise(self.devices)]
        apart = [(a, b) for a, b in skips if self.devices[a] != self.devices[b]]
        far = sum(sum(cut[a:b]) if relayed else 1 for a, b in apart)
        return 2 * (sum(cut) + far)


def looped(p: int, v: int = 1) -> Placement:
    """Chunk c of device i is virtual stage c·p + i (Narayanan et al. 2021, arXiv 2104.04473)."""
    _positive(p, v)
    return Placement(tuple(u % p for u in range(p * v)))


def wave(p: int, v: int = 2) -> Placement:
    """There and back: the chunks of odd number run from device p−1 to device 0. v = 2 is the V of
    Qi et al. 2024 (arXiv 2405.15362), v = 4 the W."""
    _positive(p, v)
    return Placement(tuple(u % p if u // p % 2 == 0 else p - 1 - u % p for u in range(p * v)))


def _positive(p: int, v: int) -> None:
    if p < 1 or v < 1:
        raise ValueError(f"a placement needs p ≥ 1 devices and v ≥ 1 chunks, got p={p}, v={v}")
