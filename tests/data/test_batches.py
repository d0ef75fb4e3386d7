"""Batches: a pure function of (seed, step), every window once an epoch, no validation text in
training.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.data import shards, text
from fdp.data.batches import (
    Arrays,
    Data,
    Prefetcher,
    Windows,
    batch,
    default_cache_dir,
    eval_batches,
    load_text,
)

pytestmark = pytest.mark.fast


def windows_of(n: int, seq_len: int = 3) -> Windows:
    """Window i holds the values i·seq_len …, so that its first token identifies it."""
    return Windows(np.arange(n * seq_len, dtype=np.int32), seq_len)


def numbers(one: dict[str, np.ndarray]) -> list[int]:
    (tokens_BxL,) = one.values()
    return (tokens_BxL[:, 0] // tokens_BxL.shape[1]).tolist()


class Images:
    """What a topic writes to train on images: pixels made on demand, labelled by their index."""

    what, fix = "image set", "render more images"

    def __len__(self) -> int:
        return 10

    def take(self, indices_B):
        label_B = np.asarray(indices_B, np.int32)
        image_BxHxWxC = np.ones((4, 6, 3), np.float32) * np.float32(label_B)[:, None, None, None]
        return {"image": image_BxHxWxC, "label": label_B}


IMAGE_DIMS = {"image": ("batch", None, None, None), "label": ("batch",)}


def data_of(examples, dims, val=None) -> Data:
    return Data("made", "0" * 64, "none", None, examples, examples if val is None else val, dims)


@pytest.fixture
def corpus_file(tmp_path):
    """Forty documents; document i alone holds the word <i>."""
    path = tmp_path / "corpus.txt"
    path.write_text("\f".join(f"<{i}> " * 30 for i in range(40)))
    return str(path)


def test_windows():
    w = Windows(np.arange(11, dtype=np.int32), 4)
    assert len(w) == 2
    (name,) = w.take([1, 0])
    assert name == "tokens"
    tokens_BxL = w.take([1, 0])["tokens"]
    assert tokens_BxL.dtype == np.int32
    assert tokens_BxL.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    tokens_BxL[:] = -1
    assert w.take([0])["tokens"].tolist() == [[0, 1, 2, 3]], "a window is a copy"


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
    assert again.keys() == expected.keys() == {"tokens"}
    assert again["tokens"].dtype == np.int32
    assert again["tokens"].shape == (5, 3)
    np.testing.assert_array_equal(again["tokens"], expected["tokens"])


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
            match=r"a batch of 11 sequences of 4 tokens is longer than the corpus "
            r"\(40 tokens, 10 sequences\): "
            r"one of train\.batch ≤ 10, data\.seq_len ≤ 2, or use a larger corpus",
        ):
            call()
    for call in (lambda: batch(w, 0, 0, 0), lambda: eval_batches(w, 0, 1)):
        with pytest.raises(ValueError, match="batch size 0 must be at least 1"):
            call()
    with pytest.raises(ValueError, match="step -1 must be at least 0"):
        batch(w, -1, 2, 0)
    with pytest.raises(ValueError, match=r"eval\.batches=0 must be at least 1"):
        eval_batches(w, 2, 0)


EOS = 9
DOCUMENTS = st.lists(st.lists(st.integers(0, EOS - 1), max_size=7), min_size=1, max_size=12)


def stream(documents: list[list[int]]) -> np.ndarray:
    return np.array([EOS, *(t for d in documents for t in [*d, EOS])], np.int32)


@settings(deadline=None, max_examples=60)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 11))
def test_segments_are_those_of_grain_and_change_no_window(documents, seq_len):
    """The oracle is grain's concat-then-split packer, fed with the documents one by one."""
    tokens_T = stream(documents)
    n = len(tokens_T) // seq_len
    if n == 0:
        return
    elements = [{"x": np.array(d, np.int32)} for d in [[EOS], *([*d, EOS] for d in documents)]]
    packed = list(
        grain.experimental.ConcatThenSplitIterDataset(
            grain.MapDataset.source(elements).to_iter_dataset(), length_struct={"x": seq_len}
        )
    )[:n]
    got = Windows(tokens_T, seq_len, eos_id=EOS).take(range(n))
    assert got["segments"].dtype == np.int32
    plain = Windows(tokens_T, seq_len).take(range(n))["tokens"]
    np.testing.assert_array_equal(got["tokens"], plain)
    # grain passes full-length documents ahead of what it holds: windows are looked up, not paired.
    ours = {(tuple(t), tuple(s)) for t, s in zip(got["tokens"], got["segments"], strict=True)}
    theirs = {(tuple(p["x"]), tuple(p["x_segment_ids"] - 1)) for p in packed}
    assert ours == theirs


@settings(deadline=None, max_examples=60)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 11))
def test_a_shifted_model_predicts_every_token_from_its_own_document(documents, seq_len):
    """Input i is token i - 1 behind a start token; position i sees the inputs of its segment up to
    i.
    """
    tokens_T = stream(documents)
    owner_T = np.repeat(np.arange(len(documents) + 1), [1, *(len(d) + 1 for d in documents)])
    n = len(tokens_T) // seq_len
    if n == 0:
        return
    got = Windows(tokens_T, seq_len, eos_id=EOS).take(range(n))
    for w, (tokens, segments) in enumerate(zip(got["tokens"], got["segments"], strict=True)):
        owner = owner_T[w * seq_len : (w + 1) * seq_len]
        assert segments[0] == 0
        np.testing.assert_array_equal(np.diff(segments), np.diff(owner))
        for i in range(seq_len):
            seen = [j - 1 for j in range(i + 1) if segments[j] == segments[i]]
            assert seen[0] == -1 or tokens[seen[0]] == EOS, "every document has a start token"
            assert all(owner[j] == owner[i] for j in seen[1:])
            assert set(range(i)) - set(seen) <= set(np.flatnonzero(owner[:i] != owner[i]))


def test_images_are_batched_like_text():
    """Batches, evaluation and prefetching need nothing but `len` and `take`."""
    images = Images()
    data = data_of(images, IMAGE_DIMS)
    assert data.seq_len == 0 and data.tokenizer is None
    labels = [batch(images, step, 4, 7)["label"].tolist() for step in range(5)]
    assert labels == [numbers(batch(windows_of(10), step, 4, 7)) for step in range(5)]
    for one in eval_batches(images, 4, 8):
        assert one["image"].shape == (4, 4, 6, 3)
        np.testing.assert_array_equal(one["image"][:, 0, 0, 0], one["label"])
    with Prefetcher(lambda step: batch(images, step, 4, 7), start=1) as ready:
        assert [next(ready)["label"].tolist() for _ in range(4)] == labels[1:]
    with pytest.raises(
        ValueError,
        match=r"a batch of 11 examples is larger than the image set \(10 examples\): "
        r"set train\.batch ≤ 10, or render more images",
    ):
        batch(images, 0, 11, 0)


def test_an_example_is_a_batch_of_one_without_values():
    image = data_of(Images(), IMAGE_DIMS).example()
    assert {k: (v.shape, v.dtype) for k, v in image.items()} == {
        "image": ((1, 4, 6, 3), np.float32),
        "label": ((1,), np.int32),
    }
    words = data_of(windows_of(4, 8), {"tokens": ("batch", "sequence")})
    assert (words.example()["tokens"].shape, words.seq_len) == ((1, 8), 8)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (
            {"image": ("batch", None, None, None)},
            "the image set has the fields image, label but dims names image: name the dims of "
            r"exactly the fields that take\(\) returns",
        ),
        (
            {**IMAGE_DIMS, "label": ("batch", None)},
            r"'label' has 1 dims, \[1\] for a batch of 1, but dims\['label'\] = "
            r"\('batch', None\) names 2: name each one",
        ),
        (
            {**IMAGE_DIMS, "image": ("batch", "sequnce", None, None)},
            r"dims\['image'\] = .* names 'sequnce': did you mean 'sequence'\?",
        ),
        (
            {**IMAGE_DIMS, "label": (None,)},
            r"dims\['label'\] = \(None,\) with shape \[1\] for a batch of 1: let the first dim, "
            'and no other, be "batch"',
        ),
    ],
)
def test_dims_that_do_not_fit_the_fields_are_refused(dims, message):
    with pytest.raises(ValueError, match=message):
        data_of(Images(), dims)


def test_splits_that_differ_are_refused():
    image, label = np.zeros((3, 4, 6, 3), np.float32), np.zeros(3, np.int32)
    small = Arrays({"image": image[:, :2], "label": label}, "test images", "add some")
    with pytest.raises(
        ValueError,
        match=r"'image' is float32 \['B', 4, 6, 3\] in the image set and "
        r"float32 \['B', 2, 6, 3\] in the test images: give both splits the same fields",
    ):
        data_of(Images(), IMAGE_DIMS, small)
    only = Arrays({"image": image}, "test images", "add some")
    with pytest.raises(ValueError, match=r"'label' is int32 .* and absent in the test images"):
        data_of(Images(), IMAGE_DIMS, only)
    wide = Arrays({"image": image.astype(float), "label": label}, "test images", "add some")
    with pytest.raises(
        ValueError, match=r"'image' of the test images is float64.*: return it as float32"
    ):
        data_of(wide, IMAGE_DIMS)
    none = Arrays({"image": image[:0], "label": label[:0]}, "test images", "add some")
    with pytest.raises(ValueError, match="the test images holds no examples: add some"):
        data_of(Images(), IMAGE_DIMS, none)
    with pytest.raises(ValueError, match=r"test images must be equally long: .*'label': 2"):
        Arrays({"image": image, "label": label[:2]}, "test images", "add some")


def test_arrays_are_copied_out():
    held = Arrays({"x": np.arange(4)}, "numbers", "count on")
    held.take([2, 0])["x"][:] = -1
    assert held.take([2, 0])["x"].tolist() == [2, 0]


def test_importing_the_module_leaves_jax_alone():
    """The caller may still have to set what jax reads when it is imported."""
    code = "import sys, fdp.data.batches; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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
    tokens = {id(w): w.take(range(len(w)))["tokens"] for w in (data.train, data.val)}
    train, val = (t.decode(tokens[id(w)]) for w in (data.train, data.val))
    in_val = {i for i in range(40) if f"<{i}>" in val}
    in_train = {i for i in range(40) if f"<{i}>" in train}
    assert not in_val & in_train
    assert len(in_val) == 8
    assert len(in_train) == 32
    assert tokens[id(data.train)][0, 0] == t.eos_id, "eos also begins the stream"
    n_eos = int((tokens[id(data.train)] == t.eos_id).sum())
    assert n_eos in (32, 33), "one before every document, one at the end (unless cut off)"
    assert tokens[id(data.train)].max() < t.mask_id


def test_packing_by_documents_names_the_document_of_every_token(corpus_file, tmp_path):
    args = (corpus_file, "byte", 0, 256, 0.2, 0, tmp_path / "cache")
    plain, data = load_text(*args), load_text(*args, packing="documents")
    assert (tmp_path / "cache").is_dir() and len(
        list((tmp_path / "cache").glob("tokens-*.bin"))
    ) == 2
    assert dict(plain.dims) == {"tokens": ("batch", "sequence")}
    assert dict(data.dims) == dict.fromkeys(("tokens", "segments"), ("batch", "sequence"))
    assert plain.seq_len == data.seq_len == 256
    for step in range(3):
        one = batch(data.train, step, 8, 0)
        np.testing.assert_array_equal(one["tokens"], batch(plain.train, step, 8, 0)["tokens"])
        for tokens, segments in zip(one["tokens"], one["segments"], strict=True):
            for number in range(segments[-1] + 1):
                read = data.tokenizer.decode(tokens[segments == number])
                whole = read.removesuffix("<|endoftext|>")
                assert "<|endoftext|>" not in whole, "an eos ends its document"
                assert whole != read or number == segments[-1]
                assert len(set(whole.split()[1:-1])) <= 1, "words of one document"
    (last,) = eval_batches(data.val, 2, 1)
    assert last.keys() == {"tokens", "segments"}
    with pytest.raises(ValueError, match=r"data\.packing='document' is unknown: did you mean 'doc"):
        load_text(*args, packing="document")


def test_load_text_notes_what_was_read_and_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(f"word {'ACGT' * 300}\n\nother".encode("utf-16"))
    data = load_text(str(path), "bpe", 280, 4, 0.2, 0, tmp_path / "cache")
    assert data.notes[0] == "1 file read (as utf-16)" and "over 1024 bytes" in data.notes[1]


def files_of(cache: Path) -> dict[str, int]:
    """Time of change of each file but locks."""
    return {p.name: p.stat().st_mtime_ns for p in cache.iterdir() if p.suffix != ".lock"}


def test_load_text_reports_and_caches(corpus_file, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "SETTLED", -1)
    cache = tmp_path / "cache"
    first = load_text(corpus_file, "bpe", 280, 16, 0.2, 0, cache)
    files = files_of(cache)
    kinds = sorted(name.split("-")[0] for name in files)
    assert kinds == ["bpe", "source", *["text"] * 3, *["tokens"] * 4]
    again = load_text(corpus_file, "bpe", 280, 16, 0.2, 0, str(cache))
    assert files == files_of(cache), "the second start writes nothing"
    np.testing.assert_array_equal(*(batch(d.train, 3, 4, 0)["tokens"] for d in (first, again)))
    assert (first.name, first.sha256, first.licence) == (again.name, again.sha256, again.licence)
    assert first.name == corpus_file
    assert len(first.sha256) == 64
    other = load_text(corpus_file, "bpe", 280, 16, 0.2, 1, cache)
    more = sorted(name.split("-")[0] for name in files_of(cache).keys() - files.keys())
    assert more == ["bpe", *["tokens"] * 4], "a split seed has its own tokenizer and tokens"
    assert other.sha256 == first.sha256


def test_unusable_cache_folder_only_warns(corpus_file, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match=r"nothing is cached, for .*file cannot be .*File exists"):
        assert len(load_text(corpus_file, "byte", 0, 16, 0.2, 0, blocked).train) > 0
    assert shards.usable(blocked) == shards.usable(blocked), "one folder for all arms"


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


def test_a_user_without_a_home_gets_a_temporary_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    shards.temporary.cache_clear()
    with pytest.warns(UserWarning, match="nothing is cached, for this user has no home folder"):
        folder = default_cache_dir()
    assert folder.is_dir() and default_cache_dir() == folder
