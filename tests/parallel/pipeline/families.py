"""Orders and costs that several tests draw from."""

import numpy as np
from hypothesis import strategies as st

from fdp.parallel.pipeline.controllable import v_half, v_min
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.fixed import (
    dualpipe_v,
    gpipe,
    interleaved,
    interleaved_zero_bubble,
    one_f_one_b,
    skip_wave,
    zb_h1,
    zb_h2,
    zbv,
)
from fdp.parallel.pipeline.orders import Op, Order, recompute, repeat, split_backward

ANY = (gpipe, one_f_one_b, zb_h1, zb_h2, zbv, skip_wave, v_half, v_min)
ROUNDS = (interleaved, interleaved_zero_bubble)  # m must be a multiple of p


@st.composite
def orders(draw, most_p=4, most_m=6):
    """Any fixed schedule, perhaps with split backwards, recomputation, fillers or several steps."""
    p, m = draw(st.integers(1, most_p)), draw(st.integers(1, most_m))
    build = draw(st.sampled_from((*ANY, *ROUNDS, dualpipe_v)))
    if build in ROUNDS:
        order = build(p, p * -(-m // p), draw(st.integers(1, 3)))
    else:
        order = build(p, max(m, 2 * p) if build is dualpipe_v else m)
    for change in (split_backward, recompute, with_fillers):
        order = change(order) if draw(st.booleans()) else order
    steps = draw(st.integers(1, 2))
    return repeat(order, steps) if steps > 1 else order


def with_fillers(order):
    """One AUX in the middle of every device."""
    ops = ((*x[: len(x) // 2], Op("AUX", i), *x[len(x) // 2 :]) for i, x in enumerate(order.ops))
    return Order(order.placement, tuple(ops), order.steps)


@st.composite
def costs(draw, order):
    """Whole seconds, so that sums are exact in any order; unlike stages and microbatches."""
    size = (len(order.placement.devices), order.microbatches // order.steps)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    F, B, W, R = (rng.integers(0, 9, size) for _ in range(4))
    activation = rng.integers(2, 9, size)
    return Costs(
        F,
        B,
        W,
        R,
        U=3,
        AUX=2,
        send=draw(st.sampled_from([0.0, 1.0, 3.0])),
        activation=activation,
        stash=activation // 2,
        saved=np.ones(size),
        message=1.0,
    )
