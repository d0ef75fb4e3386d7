"""Plan costs against published identities, the need matrix against research numbers, and the
command.

That the byte formulas equal the compiled programs is tested where those are built:
tests/parallel/context/test_attend.py."""

import numpy as np
import pytest

from fdp.count import context as cost
from fdp.count.blocks import BlockCounts
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask, allowed

pytestmark = pytest.mark.fast

CAUSAL = Mask("causal")
STRIPED = SequenceLayout("striped", 64)


def shape(heads: int, kv_heads: int, batch: int = 8) -> cost.AttentionShape:
    return cost.AttentionShape(batch, 1024, heads, kv_heads, 16, cp=8)


def units(plan: CommPlan, s: cost.AttentionShape) -> float:
    return sum(cost.forward_bytes(plan, s, CAUSAL).values()) / s.unit


@pytest.mark.parametrize(
    ("heads", "kv_heads", "want"),
    [  # ring, usp 2, usp 4, ulysses 8: table of compiled programs in cp.md 1.3, less the labels
        (8, 8, (7, 4, 2.5, 1.75)),
        (8, 2, (7, 5.5, 6.5, 7)),
        (8, 1, (7, 11, 13, 14)),
    ],
)
def test_forward_units(heads: int, kv_heads: int, want: tuple[float, ...]) -> None:
    plans = (CommPlan("ring"), CommPlan("usp", 2), CommPlan("usp", 4), CommPlan("ulysses", 8))
    assert tuple(units(p, shape(heads, kv_heads)) for p in plans) == want


def test_batch_split_has_no_limit_of_key_heads() -> None:
    """(u-1)/u·(G+1) + r-1, whatever K: with one key head it beats the head split of the same u."""
    s = shape(8, 1)
    assert units(CommPlan("batch", 4), s) == 3 / 4 * (8 + 1) + 1
    assert units(CommPlan("batch", 4), s) < units(CommPlan("usp", 4), s)


def test_ring_backward_sends_keys_again_and_float32_gradients() -> None:
    """Units of bfloat16: 7 forward; 7 of keys and 7·2 of float32 gradients backward (one hop less
    than 2·cp).
    """
    s = shape(8, 8)
    assert units(CommPlan("ring"), s) == 7
    assert sum(cost.backward_bytes(CommPlan("ring"), s, CAUSAL).values()) / s.unit == 7 + 14


def test_decode_units() -> None:
    """In units of T·H·(C+1)·4 bytes at cp = 8, C = 16: all-reduce 1.85, exchange of heads 0.875
    (cp.md 1.3, 3.c).
    """
    unit = 8 * 8 * 17 * 4
    tree, helix = (
        sum(cost.decode_bytes(kind, 1, 8, 8, 16, 8).values()) for kind in ("tree", "helix")
    )
    assert (tree, helix) == (8064, 3808)
    assert round(tree / unit, 2) == 1.85 and helix / unit == 0.875


def test_dependent_steps() -> None:
    assert cost.steps(CommPlan("ring"), 8) == (7, 8)
    assert cost.steps(CommPlan("all_gather"), 8) == (1, 1)
    assert cost.steps(CommPlan("ulysses", 8), 8) == (2, 2)
    assert cost.steps(CommPlan("usp", 2), 8) == (2 + 3, 2 + 4)
    assert cost.steps(CommPlan("ring", hops=(1, 7)), 8) == (1, 2)
    assert cost.steps(CommPlan("ring", hops=()), 8) == (0, 0)


# (needed remote units, worker imbalance, step imbalance) at S = 128K, blocks of 64, cp = 8: cp.md
# 2.c
TABLE = {
    "dense": [(3.50, 1.87, 1.87), (5.25, 1.00, 1.00), (6.99, 1.00, 1.00)],
    "window": [(0.22, 1.02, 1.02), (0.43, 1.02, 1.14), (6.99, 1.00, 1.00)],
}


@pytest.mark.parametrize("row", TABLE)
def test_need_matrix_reproduces_the_published_rows(row: str) -> None:
    blocks = np.arange(131072 // 64)
    apart = blocks[:, None] - blocks[None, :]
    mask = (apart >= 0) & (apart < 64) if row == "window" else apart >= 0
    for layout, want in zip((CONTIGUOUS, ZIGZAG, STRIPED), TABLE[row], strict=True):
        got = BlockCounts.laid_out(mask, layout, 8, 64)
        units, work = got.units_DxD, got.grouped(1)[0][0]
        # Units from other devices, and the busiest device's work over the mean where devices wait
        # once a hop.
        remote = (units.sum() - np.trace(units)) / 8
        hops = work.max(0).sum() / work.mean(0).sum()
        numbers = (remote, got.imbalance, hops)
        assert numbers == pytest.approx(want, abs=0.0051)


@pytest.mark.parametrize(
    "mask", [Mask(), CAUSAL, Mask("causal", 21), Mask(window=9), Mask("causal", 1)]
)
def test_balance_by_enumeration(mask: Mask) -> None:
    seq_len, cp = 64, 4
    pairs = np.asarray(allowed(mask, np.arange(seq_len), np.arange(seq_len)))
    pairs = np.broadcast_to(pairs, (seq_len, seq_len))
    for layout in (CONTIGUOUS, ZIGZAG, SequenceLayout("striped", 2)):
        work = pairs[layouts.permutation(layout, seq_len, cp)].reshape(cp, -1).sum(1)
        assert cost.balance(mask, layout, seq_len, cp) == pytest.approx(work.max() / work.mean())
        pooled = work.reshape(2, 2).sum(1)  # two neighbours share out their heads
        assert cost.balance(mask, layout, seq_len, cp, head_split=2) == pytest.approx(
            pooled.max() / pooled.mean()
        )


@pytest.mark.parametrize(
    "layout", [CONTIGUOUS, ZIGZAG, SequenceLayout("striped", 2), SequenceLayout("striped", 4)]
)
def test_needed_blocks_by_enumeration_of_a_random_mask(layout: SequenceLayout) -> None:
    W, cp, block = 32, 4, 2
    mask = np.random.default_rng(0).random((W, W)) < 0.1
    got = BlockCounts.laid_out(mask, layout, cp, block)
    pairs_DxO, needed_DxO = (x[0] for x in got.grouped(1))
    owner = {
        p // block: i
        for i, held in enumerate(layouts.permutation(layout, W * block, cp).reshape(cp, -1))
        for p in held
    }
    capacity = 0
    for d in range(cp):
        for s in range(cp):
            rows = [q for q in range(W) if owner[q] == d]
            columns = [k for k in range(W) if owner[k] == s]
            wanted = sum(mask[rows, k].any() for k in columns)
            assert got.units_DxD[d, s] == wanted / len(columns)
            assert needed_DxO[d, (d - s) % cp] == wanted
            assert pairs_DxO[d, (d - s) % cp] == mask[np.ix_(rows, columns)].sum()
            capacity = max(capacity, wanted * (d != s))
    assert got.capacity == capacity > 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="divides blocks of 64"):
        layouts.owners(SequenceLayout("striped", 32), 16, 64, 4)
    with pytest.raises(ValueError, match="depends on its documents"):
        cost.balance(Mask(packed=True), CONTIGUOUS, 64, 4)
    with pytest.raises(ValueError, match="heads = 4"):
        cost.forward_bytes(CommPlan("ulysses", 8), shape(4, 4), CAUSAL)


COMMAND = [
    "--seq",
    "131072",
    "--heads",
    "32",
    "--kv_heads",
    "8",
    "--head_dim",
    "128",
    "--cp",
    "8",
    "--mask",
    "causal",
]


def test_command_prints_every_plan_and_says_what_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cost.main([*COMMAND, "--window", "4096"]) == 0
    out = capsys.readouterr().out
    lines = {
        tuple(line.split("  ")[0].split()): line
        for line in out.splitlines()
        if "contiguous" in line
    }
    # One hop, of 4,095 of the 16,384 keys of a device.
    assert " 0.250 " in lines["ring",] and "16.8" in lines["ring",]
    assert "4.375" in lines["ulysses", "u=8"]
    assert "refused (batch u=2 contiguous" in out and "raise train.batch" in out


@pytest.mark.parametrize(
    ("extra", "message"), [(["--cp", "7"], "not divisible"), (["--window", "-1"], "window = -1")]
)
def test_command_refuses(
    extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cost.main([*COMMAND, *extra])
    assert exit.value.code == 2 and message in capsys.readouterr().err
