"""Native sparse attention against token-by-token loops in f64, and its shards against one device.

Legend: B sequences, L positions, D width, H query heads, K key/value heads, C head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map
from fdp.count import hlo
from fdp.mesh import AXES, make_mesh
from fdp.models import module, nsa
from fdp.models.attention import Where
from fdp.models.nsa import (
    Budget,
    NativeSparseAttention,
    select,
    selected_attention,
    selection_scores,
)
from fdp.models.shape import ModelShape

B, L, D, H, K, C = 2, 32, 16, 8, 4, 8
BUDGET = Budget(
    compress_block=8, stride=4, select_block=8, selected=3, initial=1, local=1, window=6
)


@functools.cache
def layer(budget=BUDGET, qk_norm=True, sequence_parallel=False):
    shape = ModelShape(
        1, D, H, K, C, D, D, 1e-6, 100.0, qk_norm=qk_norm, sequence_parallel=sequence_parallel
    )
    return NativeSparseAttention(shape, budget)


WHERE = Where(jnp.arange(L), jnp.arange(L))  # the layer counts positions itself


def apply(m, params, x):
    """Output of the layer on this device's share of the sequence."""
    return module.run(m, {"params": params}, x, WHERE)[0]


@functools.cache
def setup(**kwargs):
    """Layer, its parameters and an input. Weights of gates and phi are enlarged so that they
    matter.
    """
    m = layer(**kwargs)
    x = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
    params = jax.jit(lambda key: module.init(m, key, x, WHERE))(jax.random.key(0))["params"]
    grow = {"w_gate": 2.0, "position": 30.0, "w_q": 2.0}
    larger = lambda path, a: np.asarray(a) * grow.get(path[-1].key, 1.0)
    return m, jax.tree_util.tree_map_with_path(larger, params), x


# One device
# -------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("compress", "stride", "block"), [(32, 16, 64), (8, 4, 8), (16, 4, 8), (8, 8, 8), (4, 4, 12)]
)
def test_scores_weigh_compression_blocks_by_their_overlap_and_sum_the_group(
    compress, stride, block
):
    budget = Budget(compress, stride, block, selected=3)
    length = 4 * block if 4 * block >= compress else 8 * block
    blocks = (length - compress) // stride + 1
    p = np.random.default_rng(0).random((2, 3, 2, 5, blocks))
    expected = np.zeros((2, 3, 5, length // block))
    for i in range(blocks):
        tokens = set(range(i * stride, i * stride + compress))
        for j in range(length // block):
            shared = len(tokens & set(range(j * block, (j + 1) * block)))
            expected[..., j] += p[..., i].sum(2) * shared / stride
    got = selection_scores(jnp.asarray(p, jnp.float32), budget)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.fast
def test_selection_holds_forced_blocks_then_the_best_visible_ones():
    budget = Budget(4, 4, 4, selected=4, initial=1, local=2)
    scores = np.tile(np.array([0.0, 5, 1, 3, 4, 2, 0, 9], np.float32), (1, 1, 32, 1))
    chosen = np.asarray(jax.jit(lambda s: select(s, budget, jnp.arange(32)))(scores))[0, 0]
    for t in range(32):
        own = t // 4
        visible = set(range(own + 1))
        forced = {0, own, own - 1} & visible
        best = sorted(visible - forced, key=lambda j: -scores[0, 0, 0, j])[: 4 - len(forced)]
        assert set(np.flatnonzero(chosen[t])) == forced | set(best), t
    ties = np.asarray(select(jnp.zeros((1, 1, 32, 8)), budget, jnp.arange(32)))[0, 0]
    assert set(np.flatnonzero(ties[31])) == {0, 1, 6, 7}  # equal scores: the earlier block


@pytest.mark.fast
def test_with_all_blocks_selected_the_branch_is_full_causal_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, L, heads, C)).astype(np.float32) for heads in (H, K, K))
    scores = jnp.asarray(rng.random((B, K, L, 4)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def branch(blocks, q, k, v):
        chosen = select(scores, Budget(8, 4, 8, selected=blocks, local=1), jnp.arange(L))
        return selected_attention(q, k, v, chosen, jnp.arange(L))

    full = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(branch(4, q, k, v), full, atol=1e-5)
    some = branch(2, q, k, v)
    np.testing.assert_allclose(
        some[:, :16], full[:, :16], atol=1e-5
    )  # two blocks are all there are
    assert np.abs(some[:, 16:] - full[:, 16:]).max() > 0.1


def rotate(x, positions, base=100.0):
    """Rotary embedding of [..., C] vectors at the given positions, one a row."""
    angle = positions[:, None] * base ** (-np.arange(0, C, 2) / C)
    a, b = x[..., : C // 2], x[..., C // 2 :]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def attend(q, k, v):
    """One query against a set of keys, f64: weights and output."""
    s = k @ q / C**0.5
    p = np.exp(s - s.max())
    p /= p.sum()
    return p, p @ v


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def by_hand(params, x, b):
    """The module as loops over heads and tokens, from the paper's equations 5 to 12."""
    w = jax.tree.map(lambda a: np.asarray(a, float), params)
    phi, out = w["compression"], np.zeros((B, L, D))
    gelu = lambda z: z / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))
    starts = np.arange(0, L - b.compress_block + 1, b.stride)
    for n, group in np.ndindex(B, K):
        kv = np.einsum("ld,nsdc->nslc", x[n], w["w_kv"][:, :, :, group])
        flat = [
            [kv[0, s, i : i + b.compress_block] + phi["position"][s, group] for i in starts]
            for s in range(2)
        ]
        hidden = [
            [gelu(np.einsum("mc,mcd->d", y, phi["w_in"][s, group])) for y in flat[s]]
            for s in range(2)
        ]
        k_cmp, v_cmp = (np.array(hidden[s]) @ phi["w_out"][s, group] for s in range(2))
        k_cmp = rotate(norm(k_cmp, w["k_norm_compressed"]["scale"]), starts + b.compress_block - 1)
        k_slc = rotate(norm(kv[1, 0], w["k_norm_selected"]["scale"]), np.arange(L))
        k_win = rotate(norm(kv[2, 0], w["k_norm_window"]["scale"]), np.arange(L))
        heads = range(group * H // K, (group + 1) * H // K)
        q = {
            h: rotate(norm(x[n] @ w["w_q"][:, h], w["q_norm"]["scale"]), np.arange(L))
            for h in heads
        }
        for t in range(L):
            past = np.flatnonzero(starts + b.compress_block - 1 <= t)
            score, o_cmp = np.zeros(L // b.select_block), {}
            for h in heads:
                p, o_cmp[h] = (
                    attend(q[h][t], k_cmp[past], v_cmp[past]) if len(past) else ([], np.zeros(C))
                )
                for i, weight in zip(past, p, strict=True):
                    for token in range(starts[i], starts[i] + b.compress_block):
                        score[token // b.select_block] += weight
            own = t // b.select_block
            forced = {*range(b.initial), *range(own - b.local + 1, own + 1)} & set(range(own + 1))
            rest = sorted(set(range(own + 1)) - forced, key=lambda j: (-score[j], j))
            blocks = forced | set(rest[: b.selected - len(forced)])
            read = [s for s in range(t + 1) if s // b.select_block in blocks]
            near = range(max(0, t - b.window + 1), t + 1)
            for h in heads:
                o_slc, o_win = (
                    attend(q[h][t], k[list(s)], v[list(s)])[1]
                    for k, v, s in ((k_slc, kv[1, 1], read), (k_win, kv[2, 1], near))
                )
                g = 1 / (1 + np.exp(-x[n, t] @ w["w_gate"][:, h]))
                out[n, t] += (g[0] * o_cmp[h] + g[1] * o_slc + g[2] * o_win) @ w["w_o"][h]
    return out


@pytest.mark.parametrize(
    "budget", [BUDGET, Budget(12, 4, 8, selected=2, initial=0, local=2, window=3)], ids=["8", "12"]
)
def test_module_equals_loops_over_tokens(budget):
    m, params, x = setup(budget=budget)
    got = jax.jit(functools.partial(apply, m))(params, x)
    np.testing.assert_allclose(got, by_hand(params, x, budget), atol=2e-5)


def test_no_output_depends_on_a_later_token_and_every_branch_on_earlier_ones():
    m, params, x = setup()
    f = jax.jit(functools.partial(apply, m))
    base = np.asarray(f(params, x))
    for t in (0, 7, 8, 15, 19, 31):
        moved = x.copy()
        moved[:, t] += 3.0
        change = np.abs(np.asarray(f(params, moved)) - base).max((0, 2))
        assert change[:t].max(initial=0) == 0 and change[t] > 1e-3, t
    # No branch is dead: without its values the output is another.
    for branch in range(3):
        w_kv = params["w_kv"].copy()
        w_kv[branch, 1] = 0
        assert np.abs(f({**params, "w_kv": w_kv}, x) - base).max() > 1e-2, nsa.BRANCHES[branch]


def test_gradients_are_finite_reach_phi_and_pass_by_the_choice_of_blocks():
    m, params, x = setup()
    f = jax.jit(jax.grad(lambda p: (apply(m, p, x) ** 2).sum()))
    grads = f(params)
    norms = {k: float(jnp.linalg.norm(v)) for k, v in _flat(grads)}
    assert np.isfinite(list(norms.values())).all()
    assert min(norms.values()) > 1e-4, norms
    # Keys and values of every head.
    assert (np.abs(grads["compression"]["position"]).max((2, 3)) > 1e-5).all()

    # The selection branch alone: the values of the others are zero.
    w_kv, phi = params["w_kv"].copy(), params["compression"]
    w_kv[[0, 2], 1] = 0
    w_out = phi["w_out"].copy()
    w_out[1] = 0
    alone = f({**params, "w_kv": w_kv, "compression": {**phi, "w_out": w_out}})
    # Keys of phi: only the choice reads them.
    assert not np.asarray(alone["compression"]["position"][0]).any()
    assert np.abs(alone["w_kv"][1]).max() > 1e-3


def _flat(tree):
    return [
        ("/".join(str(k.key) for k in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.fast
def test_queries_before_the_first_compressed_block_get_zero_from_it():
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=s).astype(np.float32) for s in ((B, L, H, C), (B, 7, K, C), (B, 7, K, C))
    )
    last = 7 + 4 * np.arange(7)

    @jax.jit
    def outcome(k):
        f = lambda k: nsa.compressed_attention(q, k, v, jnp.asarray(last), jnp.arange(L))
        return *f(k), jax.grad(lambda k: f(k)[0].sum())(k)

    out, p, grad = outcome(k)
    assert not out[:, :7].any() and (np.abs(out[:, 7:]).max((0, 2, 3)) > 0).all()
    np.testing.assert_allclose(
        out[:, 7], np.repeat(v[:, 0], H // K, 1), atol=1e-6
    )  # one block in sight: its value
    np.testing.assert_array_equal(
        (np.asarray(p) > 0).sum(-1)[0, 0, 0], [sum(t >= last) for t in range(L)]
    )
    assert np.isfinite(grad).all()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Budget(compress_block=30),
            "compress_block 30 is not a multiple of stride 16.*set compress_block=16",
        ),
        (
            lambda: Budget(select_block=40),
            "select_block 40 is not a multiple of stride 16.*set select_block=32",
        ),
        (lambda: Budget(selected=2), r"selected 2 < initial \+ local = 1 \+ 2: set selected=3"),
        (lambda: Budget(local=0), "local 0 ≥ 1"),
        (lambda: Budget(window=0), "window 0 ≥ 1"),
        (
            lambda: Budget().check_length(100),
            "100 tokens must be a multiple of select_block 64 .*set the length to 128",
        ),
        (
            lambda: Budget(compress_block=128).check_length(64),
            "at least compress_block 128: set the length to 128",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Shards
# -------------------------------------------------------------------------------------------------


SP = {"sequence_parallel": True}
MESHES = {
    "cp4": ({"cp": 4}, {}),
    # Four tokens a device: a compression block reaches over the whole next one.
    "cp8": ({"cp": 8}, {}),
    "dp2·tp4": ({"dp": 2, "tp": 4}, {"qk_norm": False}),
    "dp2·cp2·tp2·SP": ({"dp": 2, "cp": 2, "tp": 2}, SP),
}
TARGET = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)


def step(m, axes, params, x, target):
    """((loss, output), gradients)."""

    def loss(params):
        y = apply(m, params, x)
        return psum(((y - target) ** 2).sum(), axes), y

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def one_device(qk_norm):
    m, params, x = setup(qk_norm=qk_norm)
    return jax.device_get(jax.jit(functools.partial(step, m, ()))(params, x, TARGET))


@pytest.mark.parametrize("case", MESHES)
def test_every_mesh_equals_one_device(case):
    degrees, fields = MESHES[case]
    qk_norm = fields.get("qk_norm", True)
    _, params, x = setup(qk_norm=qk_norm)
    m, mesh = layer(**fields), make_mesh(dict.fromkeys(AXES, 1) | degrees)
    specs = module.abstract(m, x, WHERE)[1]["params"]
    axes = ("dp", "cp", "tp") if "sequence_parallel" in fields else ("dp", "cp")
    of_x = P("dp", axes[1:])
    f = shard_map(functools.partial(step, m, axes), mesh, (specs, of_x, of_x), ((P(), of_x), specs))
    (loss, y), grads = jax.jit(f, compiler_options=hlo.QUICK)(params, x, TARGET)
    (want_loss, want), want_grads = one_device(qk_norm)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for (name, a), (_, b) in zip(_flat(grads), _flat(want_grads), strict=True):
        scale = np.abs(b).max()
        assert scale > 1e-4, name
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, err_msg=name)


@pytest.mark.fast
def test_parts_of_the_sequence_that_a_compression_block_does_not_fit_are_refused():
    budget = Budget(compress_block=16, stride=4, select_block=8, selected=3, window=6)
    m, params, x = setup(budget=budget)
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "cp": 4})
    f = shard_map(lambda x: apply(m, params, x), mesh, P(None, "cp"), P(None, "cp"))
    with pytest.raises(
        ValueError, match=r"S/cp = 32/4 = 8 tokens .*at least compress_block - stride = 12: lower"
    ):
        jax.eval_shape(f, x)


@pytest.mark.fast
def test_the_tokens_that_a_query_reads_are_counted():
    b, found = BUDGET, 0
    for t in range(L):
        found += sum(i + b.compress_block - 1 <= t for i in range(0, L, b.stride))
        own = t // b.select_block
        blocks = range(max(0, own - b.selected + 1), own + 1)  # as many as any choice
        found += sum(s // b.select_block in blocks for s in range(t + 1)) + min(t + 1, b.window)
    assert b.tokens(L) == found / L
