"""Orders with a shared output head: operation S on every stage (Yeung et al. 2024, "Balancing
Pipeline Parallelism with Vocabulary Parallelism").

S of a microbatch stands between F and B of the last virtual stage. All stages run it at once, each
on its share of the vocabulary, so the last stage computes no more than the others."""

from fdp.parallel.pipeline.orders import Op, Order, build
from fdp.parallel.pipeline.table import has_head, ticks


def with_head(order: Order) -> Order:
    """`order`, of any placement, with S of every microbatch on every stage; BW becomes B and W, so
    that S may stand between them.

    S runs in the tick after F of the last virtual stage, while all else pauses. A step of m
    microbatches has m ticks more and no other bubble, and a device holds as many microbatches as
    before: p on stage 0 of 1F1B. The p + 1 and p + 2 of the paper pay for messages of S that hide
    behind other operations; here S waits for them.

    Raises ValueError as `ticks`, and for an order that has S already."""
    if has_head(order):
        raise ValueError("the order has operations S already: give the one without them")
    place, done = order.placement, ticks(order)
    last = len(place.devices) - 1
    found: list[list[tuple[float, Op]]] = [
        [(done["F", last, k] + 0.5, Op("S", k)) for k in range(order.microbatches)]
        for _ in range(place.p)
    ]
    for (kind, u, k), tick in done.items():
        found[place.devices[u]].append((tick, Op(kind, k, place.chunks[u])))
    return build(place, lambda i: [op for _, op in sorted(found[i])])
