"""Batches: a pure function of (seed, step), every window once an epoch, no validation text in
training.
"""

import threading
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.data.batches import Prefetcher, Windows, batch, default_cache_dir, eval_batches, load_text

pytestmark = pytest.mark.fast


def windows_of(n: int, seq_len: int = 3) -> Windows:
    """Window i holds the values i·seq_len …, so that its first token identifies it."""
    return Windows(np.arange(n * seq_len, dtype=np.int32), seq_len)


def numbers(tokens_BxL: np.ndarray) -> list[int]:
    return (tokens_BxL[:, 0] // tokens_BxL.shape[1]).tolist()


@pytest.fixture
def corpus_file(tmp_path):
    """Forty documents; document i alone holds the word <i>."""
    path = tmp_path / "corpus.txt"
    path.write_text("\f".join(f"<{i}> " * 30 for i in range(40)))
    return str(path)


def test_windows():
    w = Windows(np.arange(11, dtype=np.int32), 4)
    assert len(w) == 2
    assert w[1].dtype == np.int32
    assert w[1].tolist() == [4, 5, 6, 7]
    assert w.take([1, 0]).tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert len(list(w)) == 2
    w[0][:] = -1
    assert w[0].tolist() == [0, 1, 2, 3], "a window is a copy"


def test_windows_errors():
    tokens_T = np.zeros(1234, np.int32)
    message = (
        r"sequence length 4096 is longer than the corpus \(1,234 tokens\): "
        r"set data\.seq_len=1024 or use a larger corpus"
    )
    with pytest.raises(ValueError, match=message):
        Windows(tokens_T, 4096)
    with pytest.raises(ValueError, match=r"data\.seq_len=0 must be at least 1"):
        Windows(tokens_T, 0)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 40), seed=st.integers(-3, 2**70))
def test_every_window_occurs_once_an_epoch(n, batch_size, seed):
    batch_size = min(batch_size, n)
    w = windows_of(n)
    steps = -(-2 * n // batch_size)
    seen = [i for step in range(steps) for i in numbers(batch(w, step, batch_size, seed))]
    assert sorted(seen[:n]) == list(range(n))
    assert sorted(seen[n : 2 * n]) == list(range(n))


def test_epochs_and_seeds_have_their_own_order():
    w = windows_of(500)
    epochs = [tuple(numbers(batch(w, epoch, 500, seed))) for seed in range(4) for epoch in range(4)]
    assert len(set(epochs)) == 16, "in particular, epoch 1 of seed 0 is not epoch 0 of seed 1"
    fixed = [sum(a == b for a, b in zip(e, range(500), strict=True)) for e in epochs]
    assert max(fixed) < 10, "a shuffle leaves about one element in place"


@settings(deadline=None, max_examples=50)
@given(step=st.integers(0, 10**6), seed=st.integers(0, 9))
def test_batch_is_pure(step, seed):
    """Resuming at any step gives the batch that the uninterrupted run saw, whatever was read
    before.
    """
    here, there = windows_of(37), windows_of(37)
    expected = batch(here, step, 5, seed)
    batch(there, step // 2, 5, seed)
    batch(there, 0, 5, seed + 1)
    again = batch(there, step, 5, seed)
    assert again.dtype == np.int32
    assert again.shape == (5, 3)
    np.testing.assert_array_equal(again, expected)


def test_order_is_frozen():
    """A resumed run needs the order of the run it resumes: a change of it is a breaking change."""
    assert numbers(batch(windows_of(10), 0, 10, 0)) == [4, 0, 5, 7, 9, 1, 3, 8, 6, 2]


def test_eval_batches_are_sequential():
    w = windows_of(10)
    assert [numbers(b) for b in eval_batches(w, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [numbers(b) for b in eval_batches(w, 4, 1)] == [[0, 1, 2, 3]]


def test_batch_errors():
    w = windows_of(10, seq_len=4)
    for call in (lambda: batch(w, 0, 11, 0), lambda: eval_batches(w, 11, 1)):
        with pytest.raises(
            ValueError,
            match=r"a batch of 11 sequences of 4 tokens is longer than the corpus \(40 tokens, 10 sequences\): "
            r"set train\.batch=10, data\.seq_len=2 or use a larger corpus",
        ):
            call()
    for call in (lambda: batch(w, 0, 0, 0), lambda: eval_batches(w, 0, 1)):
        with pytest.raises(ValueError, match="batch size 0 must be at least 1"):
            call()
    with pytest.raises(ValueError, match="step -1 must be at least 0"):
        batch(w, -1, 2, 0)
    with pytest.raises(ValueError, match=r"eval\.batches=0 must be at least 1"):
        eval_batches(w, 2, 0)


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fdp-prefetch")]


def test_prefetcher_yields_successive_steps():
    with Prefetcher(lambda step: step * 10, lambda x: x + 1, start=5) as ready:
        assert [next(ready) for _ in range(6)] == [51, 61, 71, 81, 91, 101]
        assert len(prefetch_threads()) == 1
    assert prefetch_threads() == []


def test_prefetcher_works_ahead_by_depth_and_no_further():
    done: list[int] = []
    with Prefetcher(lambda step: done.append(step) or step, start=0, depth=2) as ready:
        deadline = time.monotonic() + 5
        while len(done) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert done == [0, 1], "two are ready before the first is asked for, and no third"
        assert next(ready) == 0
    assert done[:3] in ([0, 1], [0, 1, 2])


def test_prefetcher_raises_at_the_failing_step():
    def fails_at_two(step: int) -> int:
        if step == 2:
            raise OSError("disk is gone")
        return step

    with Prefetcher(fails_at_two) as ready:
        assert [next(ready), next(ready)] == [0, 1]
        with pytest.raises(OSError, match="disk is gone"):
            next(ready)
        assert prefetch_threads() == []
        with pytest.raises(RuntimeError, match="not running"):
            next(ready)


def test_prefetcher_does_not_end_silently():
    with (
        Prefetcher(lambda step: next(iter(()))) as ready,
        pytest.raises(RuntimeError, match="raised StopIteration"),
    ):
        next(ready)


def test_prefetcher_place_error_and_early_exit():
    def refuse(x: int) -> int:
        raise ValueError("no room on the device")

    with (
        Prefetcher(lambda step: step, refuse) as ready,
        pytest.raises(ValueError, match="no room on the device"),
    ):
        next(ready)
    started = threading.Event()

    def slow(step: int) -> None:
        started.set()
        time.sleep(0.1)

    begin = time.monotonic()
    with Prefetcher(slow, depth=50):
        started.wait(5)
    assert time.monotonic() - begin < 2, "waits for the step in progress, not for the queue"
    assert prefetch_threads() == []


def test_prefetcher_misuse():
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        next(Prefetcher(lambda step: step))
    with pytest.raises(ValueError, match="prefetch depth 0 must be at least 1"):
        Prefetcher(lambda step: step, depth=0)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_no_validation_document_in_training(corpus_file, tmp_path, kind):
    data = load_text(corpus_file, kind, 280, 16, 0.2, 0, tmp_path / "cache")
    t = data.tokenizer
    train, val = (t.decode(w.take(range(len(w)))) for w in (data.train, data.val))
    in_val = {i for i in range(40) if f"<{i}>" in val}
    in_train = {i for i in range(40) if f"<{i}>" in train}
    assert not in_val & in_train
    assert len(in_val) == 8
    assert len(in_train) == 32
    assert t.decode([*data.train[0][:1]]) == "<|endoftext|>", "eos also begins the stream"
    n_eos = int((data.train.take(range(len(data.train))) == t.eos_id).sum())
    assert n_eos in (32, 33), "one before every document, one at the end (unless cut off)"
    assert max(int(w.max()) for w in data.train) < t.mask_id


def test_load_text_reports_and_caches(corpus_file, tmp_path):
    cache = tmp_path / "cache"
    first = load_text(corpus_file, "bpe", 280, 16, 0.2, 0, cache)
    files = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert sorted(name.split("-")[0] for name in files) == ["bpe", "tokens", "tokens"]
    again = load_text(corpus_file, "bpe", 280, 16, 0.2, 0, str(cache))
    assert files == {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}, (
        "the second start writes nothing"
    )
    np.testing.assert_array_equal(batch(first.train, 3, 4, 0), batch(again.train, 3, 4, 0))
    assert (first.name, first.sha256, first.licence) == (again.name, again.sha256, again.licence)
    assert first.name == corpus_file
    assert len(first.sha256) == 64
    other = load_text(corpus_file, "bpe", 280, 16, 0.2, 1, cache)
    assert len(list(cache.iterdir())) == 6, "another split seed has its own tokenizer and tokens"
    assert other.sha256 == first.sha256


@pytest.mark.parametrize("damage", ["empty", "truncated", "other"])
def test_corrupt_token_cache_is_rebuilt(corpus_file, tmp_path, damage):
    cache = tmp_path / "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = load_text(corpus_file, "byte", 0, 16, 0.2, 0, cache).train.take(range(50))
    for path in cache.iterdir():
        whole = path.read_bytes()
        path.unlink()  # a fresh file: the old one is still mapped
        if damage == "other":
            np.save(path, np.zeros((2, 2)))
        else:
            path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    with pytest.warns(UserWarning, match="rebuilding the unreadable token cache"):
        after = load_text(corpus_file, "byte", 0, 16, 0.2, 0, cache).train.take(range(50))
    np.testing.assert_array_equal(before, after)


def test_unusable_cache_folder_only_warns(corpus_file, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="going on without the cache file"):
        assert len(load_text(corpus_file, "byte", 0, 16, 0.2, 0, blocked).train) > 0


def test_short_splits_say_which(corpus_file, tmp_path):
    with pytest.raises(
        ValueError, match=r"longer than the training split of the corpus \(4,\d+ tokens\)"
    ):
        load_text(corpus_file, "byte", 0, 10_000, 0.2, 0, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"longer than the validation split of the corpus \(1,\d+ tokens\): "
        r"set data\.seq_len=1024 or raise data\.val_fraction",
    ):
        load_text(corpus_file, "byte", 0, 3000, 0.2, 0, tmp_path)


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "fdp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "fdp"
