"""Routers against their published definitions, written out in NumPy, and what they promise.

Legend: B sequences, L positions, D width, E experts, K choices of a token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.models import module
from fdp.models.attention import Where
from fdp.models.router import NOISE, Routed, Router, Routing
from fdp.models.shape import ModelShape

pytestmark = pytest.mark.fast

B, L, D, E, K = 3, 16, 8, 8, 2
SHAPE = ModelShape(2, D, 2, 2, 4, 16, 16)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((B, L, D)), jnp.float32)
NOISE_B = jnp.array([1.0, 0.5, 0.125])
WHERE = Where(jnp.arange(L), jnp.arange(L), noise=NOISE_B)


def route(routing: Routing, x: Any = X, where: Where = WHERE, replay: Any = None, **leaves) -> Any:
    """(routed, variables); `leaves` replace parameters, `bias` the state."""
    router = Router(SHAPE, routing)
    variables = module.init(router, jax.random.key(0), x, where)
    if "bias" in leaves:
        variables["state"]["bias"] = leaves.pop("bias")
    variables["params"] |= leaves
    routed: Routed = module.run(router, variables, x, where, replay)[0]
    return routed, variables


def scores(routing: Routing) -> np.ndarray:
    logits = np.asarray(X, np.float64) @ np.asarray(route(routing)[1]["params"]["w"], np.float64)
    if routing.score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def official(routing: Routing, bias_E: np.ndarray, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """The gate of DeepSeek-V2 (`fill` 0, group score the maximum) and -V3 (-inf, the two best)."""
    p = scores(routing)
    select = p + bias_E
    by_group = select.reshape(B, L, routing.groups, -1)
    value = np.sort(by_group, -1)[..., -routing.best :].sum(-1)
    kept = np.argsort(-value, -1, kind="stable")[..., : routing.kept]
    mask = np.zeros(value.shape, bool)
    np.put_along_axis(mask, kept, True, -1)
    select = np.where(mask[..., None], by_group, fill).reshape(select.shape)
    ids = np.argsort(-select, -1, kind="stable")[..., : routing.topk]
    gates = np.take_along_axis(p, ids, -1)
    if routing.normalise:
        gates = gates / gates.sum(-1, keepdims=True)
    return ids, gates * routing.scale


GATES = {
    "Mixtral": (Routing(E, K), 0.0),
    "OLMoE": (Routing(E, K, normalise=False), 0.0),
    "DeepSeek-V2": (Routing(E, K, normalise=False, scale=16.0, groups=4, kept=2), 0.0),
    "DeepSeek-V3": (
        Routing(E, 3, score="sigmoid", scale=2.5, groups=4, kept=2, best=2, bias=True),
        -np.inf,
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_published_gates(name: str) -> None:
    routing, fill = GATES[name]
    bias_E = RNG.standard_normal(E) * 0.3 if routing.bias else np.zeros(E)
    more = {"bias": jnp.asarray(bias_E, jnp.float32)} if routing.bias else {}
    routed, _ = route(routing, **more)
    ids, gates = official(routing, bias_E, fill)
    assert (np.asarray(routed.ids) == ids).all()
    np.testing.assert_allclose(routed.gates, gates, rtol=2e-5)


def test_the_bias_moves_the_choice_and_neither_weights_nor_gradients() -> None:
    routing = Routing(E, K, bias=True, normalise=False)
    plain, variables = route(routing)
    bias_E = jnp.zeros(E).at[5].set(10.0)
    moved, _ = route(routing, bias=bias_E)
    assert (moved.ids[..., 0] == 5).all() and not (plain.ids[..., 0] == 5).all()
    np.testing.assert_array_equal(moved.gates[..., 0], plain.scores[..., 5])

    def loss(state):
        given = {"params": variables["params"], "state": state}
        return module.run(Router(SHAPE, routing), given, X, WHERE)[0].gates.sum()

    assert not jax.grad(loss)({"bias": bias_E})["bias"].any()


def test_ties_go_to_the_lower_id() -> None:
    routed, _ = route(Routing(E, 3), w=jnp.zeros((D, E)))
    assert (routed.ids == jnp.arange(3)).all()
    routed, _ = route(Routing(E, K, "expert"), w=jnp.zeros((D, E)))
    first = jnp.arange(L) < L * K // E  # equal tokens: those with the lower positions
    assert ((routed.ids >= 0) == first[None, :, None]).all()


def test_replayed_ids_take_the_routers_own_weights() -> None:
    ids = jnp.asarray(RNG.integers(0, E, (B, L, K)))
    routed, _ = route(Routing(E, K, normalise=False), replay=ids)
    assert (routed.ids == ids).all()
    own = jnp.take_along_axis(routed.scores, ids, -1)
    np.testing.assert_array_equal(routed.gates, own)


def test_choices_of_tokens_cannot_be_replayed_where_experts_choose() -> None:
    with pytest.raises(
        ValueError, match=r"replayed ids are choices of tokens.* set choice='token'"
    ):
        route(Routing(E, K, "expert"), replay=jnp.zeros((B, L, K), jnp.int32))


@pytest.mark.parametrize("noise", NOISE)
def test_no_product_rounds_its_factors_on_an_accelerator(noise: str) -> None:
    routing = Routing(E, K, noise=noise, **({"groups": 4, "kept": 2} if noise == "group" else {}))
    router = Router(SHAPE, routing)
    params = module.init(router, jax.random.key(0), X, WHERE)["params"]

    def total(params: Any) -> jax.Array:
        return module.run(router, {"params": params}, X, WHERE)[0].gates.sum()

    found = str(jax.make_jaxpr(jax.grad(total))(params))
    exact = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    assert found.count("dot_general[") == found.count(exact) > 1


def test_experts_choose_their_best_tokens_and_more_where_less_is_masked() -> None:
    routing = Routing(E, K, "expert", low=1.0, high=3.0)
    routed, _ = route(routing)
    for b, r in enumerate(NOISE_B):
        take = round(float(1 + 2 * (1 - r)) * L / E)
        for e in range(E):
            best = np.argsort(-np.asarray(routed.scores[b, :, e]), kind="stable")[:take]
            assert set(np.flatnonzero(routed.ids[b, :, e] == e)) == set(best)
    chosen = routed.ids >= 0
    np.testing.assert_array_equal(routed.gates, jnp.where(chosen, routed.scores, 0.0))
    assert int(chosen.sum(1).max()) <= routing.most(L) and routed.each == B * routing.most(L)


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_a_sample_does_not_depend_on_its_batch_mates(choice: str) -> None:
    routing = Routing(E, K, choice, noise="film", low=1.0, high=3.0)
    leaves = {"film": jnp.asarray(RNG.standard_normal((8, 2 * D)), jnp.float32)}
    together, _ = route(routing, **leaves)
    for b in range(B):
        where = Where(WHERE.index, WHERE.position, noise=NOISE_B[b : b + 1])
        alone, _ = route(routing, X[b : b + 1], where, **leaves)
        assert (alone.ids[0] == together.ids[b]).all()


@pytest.mark.parametrize("noise", NOISE)
def test_what_reads_the_noise_starts_at_nothing_and_then_matters(noise: str) -> None:
    more = {"groups": 4, "kept": 4} if noise == "group" else {}
    routing = Routing(E, K, noise=noise, normalise=False, **more)
    plain, _ = route(Routing(E, K, normalise=False))
    routed, variables = route(routing)
    assert (routed.ids == plain.ids).all()
    np.testing.assert_allclose(routed.gates, plain.gates, rtol=1e-6)
    params = variables["params"]
    assert sum(x.size for x in params.values()) == Router(SHAPE, routing, parent=None).weights(D)
    if noise != "none":
        name = next(n for n in params if n != "w")
        moved, _ = route(routing, **{name: jnp.asarray(RNG.standard_normal(params[name].shape))})
        assert not jnp.allclose(moved.gates, plain.gates)


def test_the_noise_opens_groups_that_have_a_part_on_every_rank() -> None:
    routing = Routing(E, K, noise="group", groups=4, kept=2)
    opened = jnp.zeros((8, 4)).at[0, 3].set(9.0).at[0, 1].set(8.0)
    routed, _ = route(routing, open=opened)
    assert set(np.unique(routed.ids % 4)) == {1, 3}


BAD = [
    ({"topk": 9}, r"topk=9 is not within 1\.\.experts=8: set topk=8"),
    ({"topk": 0}, r"topk=0 is not within"),
    ({"groups": 3}, "8 experts in 3 groups of which 1 are kept"),
    ({"groups": 4, "kept": 5}, "in 4 groups of which 5 are kept"),
    ({"groups": 4, "topk": 3}, r"topk=3 > kept·experts/groups = 1·8/4 = 2: .*set kept=2"),
    ({"groups": 4, "best": 3}, r"best=3 scores of a group of experts/groups = 8/4 = 2"),
    ({"low": 3.0, "high": 2.0}, r"low=3.0 and high=2.0: 0 ≤ low ≤ high ≤ experts = 8"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_impossible_routing_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Routing(**({"experts": E, "topk": K} | changes))
