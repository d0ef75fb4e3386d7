"""Seconds that one attention layer takes on the busiest device, and what of its transfers compute
does not hide.

Time, forward and backward, of the busiest device (cp.md 1.4 calls what compute does not hide
*exposed*):
- ring: lock-step; hop o+1 is under way while block o is computed, Σ_o max(busiest device,
  transfer); in the backward pass gradients follow two blocks behind their keys, over the same link,
  and the last hop is exposed;
- hop set: fetched one after another over the link from the start; a device computes each as it
  arrives, own block first, and waits for no other device; gradients are sent straight home;
- gathers: own block first while everything else is under way, then the rest; backward the rest
  first, own block while gradients travel;
- head and batch splits: both exchanges are exposed, before and after the ring of the others.
A hop and a collective are one latency each.

Legend: D devices, O ring offsets of the keys, N draws of an uncertain machine (draw 0 is nominal).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Network(Protocol):
    """Seconds of one collective among `ranks` devices, `inner` of others between neighbours,
    sending `wire` bytes each.

    `op`: HLO name as in fdp.count.context. A float, or one value a draw [N].
    """

    def seconds(self, op: str, wire: float, ranks: int, inner: int) -> Any: ...


@dataclass(frozen=True, eq=False)
class Machine:
    """`flops`: FLOP/s that the attention kernel reaches, one value or one a draw [N]; `network`
    between devices.
    """

    flops: Any
    network: Network

    def __post_init__(self) -> None:
        if np.any(np.asarray(self.flops) <= 0):
            raise ValueError(f"flops = {self.flops} FLOP/s must be positive")

    def send(self, op: str, wire: float, ranks: int, inner: int = 1) -> np.ndarray:
        """Seconds [N] of a collective, 0 without bytes or partners."""
        live = wire > 0 and ranks > 1
        return np.atleast_1d(self.network.seconds(op, wire, ranks, inner) if live else 0.0).astype(
            float
        )


def gathered(
    forward_DxOxN: np.ndarray, backward_DxOxN: np.ndarray, there_N: np.ndarray, back_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Own block behind the transfer; backward the other way round."""
    own, rest = forward_DxOxN[:, 0], forward_DxOxN[:, 1:].sum(1)
    own_back, rest_back = backward_DxOxN[:, 0], backward_DxOxN[:, 1:].sum(1)
    return (np.maximum(own, there_N) + rest).max(0), (rest_back + np.maximum(own_back, back_N)).max(
        0
    )


def lock_step(
    forward_DxOxN: np.ndarray, backward_DxOxN: np.ndarray, kv_N: np.ndarray, gradient_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The whole ring: r-1 hops of keys, and in the backward pass r-1 of gradients that start after
    block 1.
    """
    forward_OxN, backward_OxN = forward_DxOxN.max(0), backward_DxOxN.max(0)
    offset_O = np.arange(len(forward_OxN))[:, None]
    keys_OxN = (offset_O < len(offset_O) - 1) * kv_N
    forward_N = np.maximum(forward_OxN, keys_OxN).sum(0)
    backward_N = np.maximum(backward_OxN, keys_OxN + (offset_O >= 2) * gradient_N).sum(0)
    return forward_N, backward_N + (gradient_N if len(offset_O) > 1 else 0.0)


def fetched(
    hops: tuple[int, ...],
    forward_DxOxN: np.ndarray,
    backward_DxOxN: np.ndarray,
    kv_N: np.ndarray,
    gradient_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Hops fetched one after another; keys go before gradients on the link."""
    forward, backward = forward_DxOxN[:, 0], backward_DxOxN[:, 0]
    sent = np.broadcast_to(len(hops) * kv_N, backward.shape)
    for i, offset in enumerate(hops, 1):
        forward = np.maximum(forward, i * kv_N) + forward_DxOxN[:, offset]
        backward = np.maximum(backward, i * kv_N) + backward_DxOxN[:, offset]
        sent = np.maximum(sent, backward) + gradient_N
    return forward.max(0), np.maximum(backward, sent).max(0)
