"""Configuration of topic 4: which lengths, windows and drafters are counted. Imports neither jax
nor flax."""

from collections.abc import Iterator

import ml_collections

from fdp.config_sizes import LowerBound, sequences
from fdp.keys import UserError, at_least, count, integers, section, within, words

VERIFIER = "verifier"
TEXT = 32  # bytes of a sequence
# Shares of the verifier's parameters.
DRAFTS = {"tenth": 1 / 10, "thirtieth": 1 / 30}
# Task → (source, objective): bytes, besides the Markov chain.
TEXTS = {
    "bible": ("bible", "mdlm"),
    "stdlib": ("stdlib", "mdlm"),
    "bible-blocks": ("bible", "block_diffusion"),
    "stdlib-blocks": ("stdlib", "block_diffusion"),
}
# On the states and laws of the trained verifier; and shown what it said a few steps before.
LESSONS = ("distilled", "hinted")
# Total variation between a noisy oracle and the exact one, on masked rows of the chain's states.
NOISY = {"noisy 0.07": 0.07, "noisy 0.15": 0.15, "noisy 0.30": 0.30}
SELF = ("stale", "jacobi", "refreshed")  # what the verifier drafts for itself
# Drafts of a model are corrected by what the verifier drew at judged steps, or not:
PLAIN = "uncorrected "
DRAFTERS = (*SELF, *NOISY, *(PLAIN + name for name in NOISY), "exact")
BIGRAM = "bigram"  # counts of pairs of tokens in the training data
PAIRED = 1024  # ids at most: all powers of a table of pairs are kept
WIDE = 16  # the window of the claim, beside the whole chain
# Target → (order, temperature, threshold). Stale drafts at temperature 0 are FreeDave's algorithm,
# alone and on top of threshold decoding.
TARGETS: dict[str, tuple[str, float, float | None]] = {
    "first-hitting": ("random", 1.0, None),
    "entropy order": ("entropy", 1.0, None),
    "temperature 0": ("top_prob", 0.0, None),
    "threshold 0.3": ("top_prob", 0.0, 0.3),
}
# Where scores order, a quarter of the tokens is given: all masks are alike to a model, and rounding
# would choose the first; at temperature 0 all samples would be alike, too.
PROMPTED = 4

SECTIONS = {
    "speculation": section(
        lengths=integers(2, (32, 64, 128), "of the exact verifier's sequences", "tokens"),
        windows=integers(1, (4, 8, 16), "states judged at once, beside all of a chain", "states"),
        drafters=words(
            (*SELF, *NOISY, PLAIN + next(iter(NOISY)), "exact"), DRAFTERS, "of the exact verifier"
        ),
        drafts=words(tuple(DRAFTS), tuple(DRAFTS), "trained draft models, by size"),
        lessons=words((), LESSONS, "how drafts are trained besides on the data"),
        longer=count(1, "steps of a draft for each of the verifier's", "steps"),
        taught=at_least(2, 512, "of the verifier's, whose states drafts learn from", "chains"),
        # With 0.1 a draft of a tenth took 0.2 to 0.4 rounds more at L = 32 (one seed).
        hard=within("[0, 1]", 0.0, "share of the chain's last ids in what they learn"),
        texts=words((), tuple(TEXTS), "bytes that are decoded besides the Markov chain"),
        targets=words(tuple(TARGETS), tuple(TARGETS), "chains; lengths and windows vary in one"),
        sequences=count(64, "of every count", "sequences"),
        law=at_least(256, 2**18, "draws of every enumerated law", high=2**24),
    )
}


def sizes(c: ml_collections.ConfigDict) -> Iterator[LowerBound]:
    """Of the sequences that are drawn at once, and of what drafts learn from."""
    yield sequences(c, "speculation.sequences", c.speculation.sequences)
    taught, length, vocab = c.speculation.taught, c.data.seq_len, c.model.vocab
    if c.speculation.lessons:
        yield LowerBound(
            "the laws that drafts learn from",
            f"4·taught·seq_len²·vocab bytes = 4·{taught}·{length}²·{vocab}",
            4 * taught * length**2 * vocab,
            "speculation.taught, data.seq_len or model.vocab",
        )


def drafts(c: ml_collections.ConfigDict) -> dict[str, tuple[str, str]]:
    """{arm: (size, one of LESSONS, or "" for the data)} of the draft models."""
    s = c.speculation
    return {
        f"{size}-{lesson}".rstrip("-"): (size, lesson)
        for size in s.drafts
        for lesson in ("", *s.lessons)
    }


def tasks(c: ml_collections.ConfigDict) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{task: (arm of the verifier, arms of its drafts)}. Texts have plain drafts only."""
    s = c.speculation
    found = {"markov": (VERIFIER, tuple(drafts(c)))}
    for text in s.texts:
        found[text] = f"{text}-{VERIFIER}", tuple(f"{text}-{size}" for size in s.drafts)
    return found


def windows(c: ml_collections.ConfigDict, length: int) -> tuple[int, ...]:
    """Windows for a chain of `length` steps: none is longer, and the longest holds all of it."""
    return tuple(sorted({*(min(w, length) for w in c.speculation.windows), length}))


def sequences_at(c: ml_collections.ConfigDict, length: int) -> int:
    """Fewer of long ones: the states of a chain in one window, of all sequences, grow with the
    square of the length."""
    return max(1, c.speculation.sequences * min(64, length) // length)


def cut(c: ml_collections.ConfigDict) -> str:
    """What is said of windows that are longer than a chain; "" for none."""
    s = c.speculation
    long = sorted({w for w in s.windows for length in s.lengths if w > length})
    if not long:
        return ""
    return (
        f"speculation.windows={tuple(s.windows)} > steps = speculation.lengths="
        f"{tuple(s.lengths)}: {', '.join(map(str, long))} cut to the steps there are"
    )


def check(c: ml_collections.ConfigDict) -> None:
    """Raise UserError for what the study cannot count."""
    s = c.speculation
    if c.objective.name not in ("mdlm", "block_diffusion"):
        raise UserError(
            f"objective.name={c.objective.name!r}: the drafts of this topic follow the chain of a "
            "masked denoiser; set objective.name=mdlm or block_diffusion"
        )
    if c.objective.name == "block_diffusion" and s.lessons:
        raise UserError(
            f"speculation.lessons={tuple(s.lessons)} with objective.name=block_diffusion: drafts "
            "learn at states of a whole sequence; set speculation.lessons=() or objective.name=mdlm"
        )
    if not set(s.drafters) & set(SELF):
        raise UserError(
            f"speculation.drafters={tuple(s.drafters)} lacks what drafts are judged against: add "
            f"one of {', '.join(SELF)}"
        )
