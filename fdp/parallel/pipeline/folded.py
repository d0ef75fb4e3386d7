"""A pipeline schedule of a model in two halves that are joined by skips, as a U-ViT.

The second half reads in its i-th last block what the first has kept of its i-th. On a V, device i
has virtual stages i and 2p − 1 − i, so both ends of every skip: between devices go the messages of
any model, and nothing else. A skip waits in a slot from F of its first half to F of its second, its
gradient from B to B. The block in the middle runs on the last device, before the layers of virtual
stage p; its parameters lie on all devices.

Collocating both ends of the skips of a U-ViT is also PULSE's plan (arXiv 2606.19163).

Legend: p devices, V = 2p virtual stages, u one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from fdp.grads import Stages
from fdp.parallel.pipeline.chunks import place
from fdp.parallel.pipeline.executor import Operations, blank, over_pp, scheduled, types
from fdp.parallel.pipeline.placement import Placement, wave
from fdp.parallel.pipeline.table import TickTable, table


@dataclass(frozen=True)
class folded(scheduled):
    """As `scheduled`, for a model with skips. stacks: names of the parameters of its first and its
    second half. Raises ValueError for an order on another placement than the V."""

    stacks: tuple[str, str] = ("rise", "fall")

    def __post_init__(self) -> None:
        found = self.order.placement
        if found.p > 1 and found == wave(found.p):
            return
        raise ValueError(
            "skips stay on their devices where virtual stages u and V − 1 − u share one, u < V/2: "
            f"p ≥ 2 and devices = {list(wave(found.p).devices)}, not {list(found.devices)} of "
            f"p={found.p}; set pipeline.schedule='zbv', or another order on a V"
        )

    @property
    def chunks(self) -> int:
        """Parts of a device's share of one stack that are stages of their own."""
        return 1

    @cached_property
    def table(self) -> TickTable:
        """The static table."""
        return table(self.order, halves=True)

    def stack(self, path: Sequence[Any]) -> Placement:
        """Up to the last device, or back from it."""
        p, second = self.order.placement.p, path[0].key == self.stacks[1]
        return Placement(self.order.placement.devices[p:] if second else tuple(range(p)))

    def placed(self, params: Any) -> Any:
        """Stored parameters, the layers of both halves on the devices that run them."""

        def one(path: Any, x: jax.Array) -> jax.Array:
            return place(x, self.stack(path)) if over_pp(x) else x

        return jax.tree_util.tree_map_with_path(one, params)

    def operations(
        self, stages: Stages, params: Any, stacked: Any, batches: Any
    ) -> tuple[Operations, ...]:
        """Of the first half and of the second."""
        first = Rise(stages, params, stacked, batches)
        return first, Fall(stages, first)


def check_stacks(model: Any, grads: Any, pp: int) -> None:
    """Raises ValueError where a model with skips and a schedule for such do not come together."""
    skips, name = hasattr(model, "stacks"), type(model).__name__
    if skips and not isinstance(grads, folded):
        raise ValueError(
            f"mesh.pp={pp}: the skips of a {name} stay on their devices under "
            f"Experiment.grads=folded(order) only, not {type(grads).__name__}; set "
            "pipeline.schedule='zbv' or another order on a V, or mesh.pp=1"
        )
    if isinstance(grads, folded) and not skips:
        raise ValueError(
            f"mesh.pp={pp}: a {name} has no two stacks joined by skips: set "
            "Experiment.grads=scheduled(order)"
        )


class Rise(Operations):
    """The first half: F gives skips beside its message, B reads their gradients."""

    reads = "B"

    def __init__(self, stages: Stages, params: Any, stacked: Any, batches: Any):
        assert stages.skips is not None
        half = stages._replace(stack=stages.skips.rise)
        super().__init__(1, half, params, stacked, batches)

    def forward(self, k: Any, c: Any, message: Any, first: bool = False) -> dict[str, Any]:
        """F."""
        found = super().forward(k, c, message, first)
        message, skips = found["message"]
        return found | {"message": message, "skips": skips}

    @cached_property
    def none(self) -> dict[str, Any]:
        """The zeros of every result."""
        found = types(lambda: self.forward(0, 0, blank(self.x), first=True), self.permuted)
        given, residuals = blank((found["message"], found["skips"])), blank(found["residuals"])
        back = types(lambda: self.backward(0, 0, given, residuals, first=True), self.permuted)
        return blank(found | back)


class Fall(Operations):
    """The second half: F reads skips beside its message, B gives their gradients. In operations of
    its first stage the middle runs too. rise: of the same microbatches."""

    reads = "F"

    def __init__(self, stages: Stages, rise: Rise):
        assert stages.skips is not None
        given = rise.params, rise.stacked, rise.batches
        self.rise = rise
        self.middle = Operations(1, stages._replace(stack=stages.skips.middle), *given)
        self.idle = self.middle.none  # made here, outside the branches that read it
        super().__init__(1, stages._replace(stack=stages.skips.fall), *given)

    @cached_property
    def x(self) -> Any:
        """Types of a message and of skips."""
        return self.rise.x, jax.tree.map(jax.typeof, self.rise.none["skips"])

    def forward(self, k: Any, c: Any, given: Any, first: bool = False) -> dict[str, Any]:
        """F. given: message and skips."""
        message, skips = given
        before = self.middle.forward(k, c, message) if first else self.idle
        found = super().forward(k, c, (before["message"] if first else message, skips))
        found["residuals"] = before["residuals"], found["residuals"]
        return found | {"loss": found["loss"] + before["loss"], "aux": before["layers"]}

    def backward(
        self, k: Any, c: Any, message: Any, residuals: Any, first: bool = False, last: bool = False
    ) -> dict[str, Any]:
        """B."""
        of_middle, own = residuals
        found = super().backward(k, c, message, own, last=last)
        dx, skips = found["message"]
        after = self.middle.backward(k, c, dx, of_middle) if first else self.idle
        dx = after["message"] if first else dx
        return found | {"message": dx, "skips": skips, "stash": (after["stash"], found["stash"])}

    def weights(self, c: Any, stash: Any, first: bool = False) -> dict[str, Any]:
        """W."""
        of_middle, own = stash
        found = super().weights(c, own)
        if not first:
            return found
        both = found["grads"], self.middle.weights(c, of_middle)["grads"]
        return {"grads": jax.tree.map(lambda a, b: a + b, *both)}

    @cached_property
    def none(self) -> dict[str, Any]:
        """The zeros of every result."""
        x = blank(self.x)
        found = types(lambda: self.forward(0, 0, x, first=True), self.permuted)
        residuals = blank(found["residuals"])
        last = types(
            lambda: self.backward(0, 0, x[0], residuals, first=True, last=True), self.permuted
        )
        return blank(found | last | {"aux": found["aux"] | last["aux"]})
