"""The claims of topic 4 about counts and laws."""

from collections.abc import Iterable, Iterator

from fdp.study.report import Row
from fdp.topics.speculative_dlm.counted import FrontierPoint, LawDistance, RoundCounts
from fdp.topics.speculative_dlm.settings import BIGRAM, NOISY, PLAIN, SELF

ROUNDS = {32: 5.0, 64: 5.0, 128: 6.0}  # length → most rounds
AGAINST, AT_LENGTH, AT_WINDOW = 0.85, 32, 16
LAW, LOSSY = 1.5, 10.0  # times Monte-Carlo noise


def equality(counts: list[RoundCounts], what: str, cut: str = "") -> Row:
    """No id differs from the verifier's own."""
    ids = sum(len(c.rounds_B) * c.length for c in counts)
    least = min(counts, key=lambda c: c.entropy)
    note = (
        f"{len(counts)} runs of {ids:,} ids; tokens of {least.target} have the least entropy, "
        f"{least.entropy:.2f} nats"
    )
    return Row.judged(
        f"speculation changes no id, {what}",
        "ids that differ",
        sum(c.differ for c in counts),
        "ids",
        "== 0",
        "measured",
        note=f"{note}; {cut}" if cut else note,
        decides=True,
    )


def oracle(cut: str, counts: list[RoundCounts]) -> Iterator[Row]:
    """Equality and rounds of the exact verifier."""
    yield equality(counts, "exact verifier", cut)
    hits = [c for c in counts if c.target == "first-hitting"]
    for length, most in ROUNDS.items():
        yield from _fewest([c for c in hits if c.length == length], length, most)
    yield from _against([c for c in hits if (c.length, c.window) == (AT_LENGTH, AT_WINDOW)])


def _fewest(counts: list[RoundCounts], length: int, most: float) -> Iterator[Row]:
    models = [c for c in counts if c.drafter.removeprefix(PLAIN) in NOISY]
    if not models:
        return
    best = min(models, key=lambda c: c.rounds)
    own = [c for c in counts if c.drafter in SELF]
    note = f"{best.drafter} as a draft model, window {best.window}"
    if own:
        mine = min(own, key=lambda c: c.rounds)
        note += f"; {mine.drafter}, window {mine.window}: {mine.rounds:.2f}"
    given = best.rounds, "rounds", f"<= {most:g}", "counted"
    yield Row.judged(
        f"few rounds at L = {length}", "mean rounds, best drafter", *given, note=note, decides=True
    )


def _against(counts: list[RoundCounts]) -> Iterator[Row]:
    own = [c for c in counts if c.drafter in SELF]
    if not own:
        return
    mine = min(own, key=lambda c: c.rounds)
    for name in NOISY:
        for c in (c for c in counts if c.drafter == name):
            yield Row.judged(
                f"a draft of TV {NOISY[name]} needs fewer rounds than self-drafting",
                f"mean rounds, L = {AT_LENGTH}, window {AT_WINDOW}",
                c.rounds,
                "rounds",
                f"ratio <= {AGAINST}",
                "counted",
                f"best self-drafter: {mine.drafter}",
                mine.rounds,
            )


def trained(verifier: str, counts: list[RoundCounts]) -> Iterator[Row]:
    """Equality of a trained verifier, and its drafts against what it drafts for itself."""
    yield equality(counts, f"trained {verifier}")
    for key in dict.fromkeys((c.target, c.window) for c in counts):
        some = [c for c in counts if (c.target, c.window) == key]
        own = [c for c in some if c.drafter in SELF]
        models = [c for c in some if is_model(c.drafter)]
        if not own or not models:
            continue
        mine, best = (min(x, key=lambda c: c.rounds) for x in (own, models))
        others = [c for c in some if c is not mine and c is not best]
        said = ", ".join(f"{c.drafter} {c.rounds:.2f}" for c in others)
        yield Row.judged(
            f"a trained draft needs fewer rounds than self-drafting, {key[0]}, window {key[1]}",
            "mean rounds",
            best.rounds,
            "rounds",
            f"ratio <= {AGAINST}",
            "counted",
            f"best self-drafter: {mine.drafter}",
            mine.rounds,
            note=f"best draft: {best.drafter}; {said}; entropy of tokens {best.entropy:.2f} nats",
        )


def is_model(drafter: str) -> bool:
    """Whether it is a trained draft model."""
    return drafter not in SELF and BIGRAM not in drafter


def laws(found: list[LawDistance]) -> Iterator[Row]:
    """Rule coupling keeps the law, edit distance does not."""
    coupling, leap, draft, *edits = found

    def row(claim: str, rule: LawDistance, threshold: str, note: str = "") -> Row:
        given = rule.variation, "", threshold, "measured", "as many exact draws", rule.noise
        return Row.judged(claim, "total variation", *given, note=note)

    yield row("rule coupling keeps the verifier's law", coupling, f"ratio <= {LAW}")
    ends = f"{leap.rule}: {leap.variation:.3f}; {draft.rule}: {draft.variation:.3f}"
    for e in edits:
        claim = f"edit distance never reaches the verifier's law, {e.rule}"
        yield row(claim, e, f"ratio >= {LOSSY:g}", ends)


def table(counts: Iterable[RoundCounts]) -> list[str]:
    """Every count in a line."""
    return [
        f"{c.target}, L={c.length}, {c.drafter}, window {c.window}: rounds {c.rounds:.2f}, "
        f"accepted {c.accepted_S.sum()} of {c.judged_S.sum()}, states {c.states}, verifier passes "
        f"{c.nfe}, draft passes {c.passes}, ids that differ {c.differ}, entropy {c.entropy:.3f}"
        for c in counts
    ]


def frontier(points: list[FrontierPoint]) -> list[str]:
    """Every sampler in a line."""
    return [
        f"{p.sampler}: {p.nfe} passes, NLL {p.nll:.3f}, entropy {p.entropy:.3f}" for p in points
    ]
