"""Traces of routing: files of ours and of serving engines, bad files, and metrics against brute
force and published loads.

Legend: N tokens, L layers, K choices, E experts.
"""

import base64
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fdp.data import expert_loads, traces
from fdp.data.traces import ExpertCounts, Layout, Writer, read, trace
from fdp.keys import UserError

pytestmark = pytest.mark.fast
REAL = Path(__file__).parents[2].parent / "shared/data/moe/moe_routing_olmoe_mixtral.npz"
N, L, K, E = 40, 3, 2, 8
MODEL = Layout(E, L, K)


def ids(seed: int = 0, n: int = N) -> np.ndarray:
    """Distinct choices [n, L, K]."""
    draw = np.random.default_rng(seed)
    return np.argsort(draw.random((n, L, E)), axis=-1)[..., :K].astype(np.int16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two shards."""
    writer = Writer(tmp_path / "run", E)
    writer.append(ids(0), noise_N=0.25, domain_N="code", sequence_N=1)
    Writer(tmp_path / "run", E).append(ids(1), source_N=np.arange(N) % 4)
    return tmp_path / "run"


def test_shards_of_a_run_come_back_and_a_second_start_appends(folder):
    found = read(folder, MODEL)
    np.testing.assert_array_equal(found.ids_NxLxK, np.concatenate([ids(0), ids(1)]))
    assert found.ids_NxLxK.dtype == np.int16 and found.experts == E
    assert list(found.domain_N[[0, N]]) == ["code", ""]
    assert found.noise_N[0] == 0.25 and np.isnan(found.noise_N[N])
    assert found.source_N[0] == -1 and list(found.source_N[N : N + 5]) == [0, 1, 2, 3, 0]
    np.testing.assert_array_equal(found.position_N, [*range(N), *range(N)])
    one = read(folder / "shard-00001.npz", MODEL)
    np.testing.assert_array_equal(one.ids_NxLxK, found.take(slice(N, None)).ids_NxLxK)


def test_arrays_of_serving_engines_are_read(tmp_path):
    np.save(tmp_path / "vllm.npy", ids())
    np.savez(tmp_path / "vllm.npz", prompt_routed_experts=ids(0), routed_experts=ids(1, 5))
    text = base64.b64encode(ids().astype("<i4").tobytes()).decode()
    (tmp_path / "sglang.b64").write_text(text[:64] + "\n" + text[64:])
    for name in ("vllm.npy", "sglang.b64"):
        np.testing.assert_array_equal(read(tmp_path / name, MODEL).ids_NxLxK, ids())
    both = read(tmp_path / "vllm.npz", MODEL).ids_NxLxK
    np.testing.assert_array_equal(both, np.concatenate([ids(0), ids(1, 5)]))


def test_counts_of_layers_that_have_experts_are_read(tmp_path):
    rows = ["layer_id,expert_id,count", "3,0,5", "3,7,2", "5,1,4", "4,2,9", "5,1,1"]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    found = read(tmp_path / "c.csv", MODEL)
    assert isinstance(found, ExpertCounts)
    assert found.counts_LxE.tolist() == [
        [5, 0, 0, 0, 0, 0, 0, 2],
        [0, 0, 9, 0, 0, 0, 0, 0],
        [0, 5, 0, 0, 0, 0, 0, 0],
    ]
    assert expert_loads.loads(found) is found.counts_LxE


def test_a_crash_while_writing_leaves_no_shard(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    writer = Writer(folder, E)
    with pytest.raises(OSError, match="No space left"):
        writer.append(ids())
    assert sorted(p.name for p in folder.iterdir()) == ["shard-00000.npz", "shard-00001.npz"]


def _cut(folder: Path) -> Path:
    path = folder / "shard-00001.npz"
    path.write_bytes(path.read_bytes()[:-200])
    return folder


def _file(name: str, content: str):
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def _array(name: str, **arrays: np.ndarray):
    def make(folder: Path) -> Path:
        np.savez(folder / name, **arrays)
        return folder / name

    return make


WHOLE = base64.b64encode(ids().astype("<i4").tobytes()).decode()


@pytest.mark.parametrize(
    ("make", "layout", "message"),
    [
        (_cut, MODEL, r"cannot be read as a trace \(.+\): it is truncated"),
        (lambda f: f, Layout(16, L, K), "of another model: experts 8 is not 16; give"),
        (lambda f: f, Layout(E, 4, 1), "another model: layers 3 is not 4, topk 2 is not 1"),
        (lambda f: f / "none.npy", MODEL, r"none\.npy cannot be read .*No such file"),
        (lambda f: f.parent, MODEL, r"holds no shard-\*\.npz"),
        (_array("a.npz", x=ids()), MODEL, r"has \['x'\], but no array 'routed_experts'"),
        (_array("a.npz", routed_experts=ids()), Layout(4, L, K), "from 0 to 7, .* has 4 experts"),
        (_array("a.npz", routed_experts=ids() - 2), MODEL, "ids reach from -2 to 5"),
        (_array("a.npz", routed_experts=ids()[0]), MODEL, r"shape \(3, 2\) and type int16"),
        (_array("a.npz", routed_experts=ids() / 2), MODEL, "type float64: whole numbers"),
        (_file("a.b64", WHOLE[:-8]), MODEL, r"954 bytes .* 4·layers·k = 4·3·2 = 24: .* truncated"),
        (_file("a.b64", WHOLE[:-3]), MODEL, "no base64 .* truncated"),
        (_file("a.b64", ""), MODEL, "holds no tokens"),
        (_file("a.b64", WHOLE), Layout(E), r"4·0·0 = 0"),
        (_file("a.csv", "layer_id,expert_id,count\n0,9,1"), MODEL, "from 9 to 9 of 8 experts"),
        (_file("a.csv", "layer_id,expert_id,count\n0,1"), MODEL, "truncated"),
        (_file("a.csv", "layer_id,expert_id,count\n0,1,-4"), MODEL, "count from -4"),
        (_file("a.csv", "a,b\n1,2"), MODEL, "has the columns layer_id, expert_id, count"),
        (_file("a.log", ""), MODEL, r"a trace is a folder, or a file \.npz"),
    ],
)
def test_a_bad_file_is_one_line_with_values_and_a_fix(folder, make, layout, message):
    with pytest.raises(UserError, match=message) as error:
        read(make(folder), layout)
    assert "\n" not in str(error.value)


def test_arrays_of_unequal_length_are_refused():
    with pytest.raises(UserError, match="sequence_N has 3 values for 40 tokens"):
        trace(ids(), E, sequence_N=np.arange(3))
    with pytest.raises(UserError, match="ids reach from 0 to 70000"):
        trace(np.full((1, 1, 2), [0, 70_000]), E)


def test_loads_and_fan_out_are_counted():
    chosen = ids()
    chosen[::5, :, 1] = -1  # no second expert
    found = trace(chosen, E, noise_N=np.linspace(0, 1, N))
    by_hand = [[(chosen[:, i] == e).sum() for e in range(E)] for i in range(L)]
    np.testing.assert_array_equal(expert_loads.loads(found), by_hand)
    ranks = expert_loads.part_loads(expert_loads.loads(found), 4)
    np.testing.assert_array_equal(ranks, np.reshape(by_hand, (L, 4, 2)).sum(-1))
    assert expert_loads.imbalance(np.array([[3.0, 1], [0, 0]])).tolist() == [1.5, 1]
    bins = expert_loads.noise_loads(found, 5)
    assert bins.shape == (5, L, E)
    np.testing.assert_array_equal(bins.sum(0), by_hand)
    np.testing.assert_array_equal(bins[0], expert_loads.loads(found.take(slice(0, 8))))
    reached = [[len({e // 2 for e in row if e >= 0}) for row in token] for token in chosen]
    np.testing.assert_array_equal(expert_loads.distinct(found, 4), reached)
    unknown = dataclasses.replace(found, noise_N=np.full(N, np.nan, np.float32))
    assert (expert_loads.noise_bins(unknown, 5) == -1).all()
    with pytest.raises(UserError, match=r"experts 8 are not divisible by ep = 3: set ep to 2"):
        expert_loads.distinct(found, 3)


def test_information_is_that_of_the_noise_and_not_of_the_state_or_the_sequence():
    draw = np.random.default_rng(0)
    sequences, length = 120, 30
    sequence = np.repeat(np.arange(sequences), length)
    r = draw.random(sequences)
    bins = (r[sequence] * 4).astype(int)
    masked = draw.random(len(sequence)) < r[sequence]
    taste = draw.random((sequences, 6)) ** 4  # content: a sequence has its own experts
    of_content = (
        draw.random((len(sequence), 1))
        < np.cumsum(taste / taste.sum(1, keepdims=True), 1)[sequence]
    ).argmax(1)
    args = bins, masked, sequence
    assert abs(expert_loads.information(of_content[:, None], *args)) < 0.02
    of_state = np.where(masked, 0, 3)[:, None]
    assert expert_loads.information(of_state, *args) == pytest.approx(0, abs=1e-9)
    everywhere = np.zeros_like(masked)
    assert expert_loads.information(of_state, bins, everywhere, sequence) > 0.1
    share = np.bincount(bins) / len(bins)
    entropy = -(share * np.log(share)).sum()
    told = expert_loads.information(bins[:, None], bins, everywhere, sequence)
    assert told == pytest.approx(entropy, abs=0.08) and told < entropy


def test_real_loads_have_the_published_imbalance():
    """Max over mean 2.5-7.8 in OLMoE and 1.1-1.3 in Mixtral, over three layers and five domains."""
    if not REAL.exists():
        pytest.skip(f"the routing counts of OLMoE and Mixtral are not beside the project: {REAL}")
    real = np.load(REAL)
    for model, topk, experts, low, high in (
        ("olmoe", 8, 64, 2.5, 7.8),
        ("mixtral", 2, 8, 1.1, 1.3),
    ):
        counts = [
            real[f"{model}/{d}/counts"] for d in ("arxiv", "book", "c4", "github", "wikipedia")
        ]
        for found in counts:
            assert found.shape == (3, experts) and (found.sum(1) == topk * 208_896).all()
        worst = expert_loads.imbalance(
            np.stack([traces.ExpertCounts(c).counts_LxE for c in counts])
        )
        assert worst.min() == pytest.approx(low, abs=0.05)
        assert worst.max() == pytest.approx(high, abs=0.05)
