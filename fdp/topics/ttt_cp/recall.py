"""What every arm recalls: pairs, needles at a depth, pairs against bytes of state, and chunks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdp.data.recall import WordNeedle
from fdp.data.ruler_text import ByteNeedle
from fdp.run import Run
from fdp.study.claims import validation_loss
from fdp.study.measure import Measurement, Part, derive, each, measure
from fdp.study.report import Row
from fdp.topics.ttt_cp import figures
from fdp.topics.ttt_cp.arms import MemoryCase, cases, recall_task, state_bytes
from fdp.topics.ttt_cp.settings import ARMS, KJV, NEEDLE
from fdp.topics.ttt_cp.tasks import MixedPairs, answered, found_at

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LONGER = (1, 2, 4, 8)  # lengths over that of training
RIGHT = 0.9  # share of right answers at which a state is said to hold its pairs
LACT_GDN = "LaCT recalls more pairs than Gated DeltaNet at equal bytes of state and equal tokens"

Shares = Mapping[str, Sequence[float]]  # of each arm's seeds


def parts(run: Run) -> list[Part]:
    """All measurements of trained arms."""
    by_task: dict[str, dict[str, MemoryCase]] = {}
    for name, case in cases(run.config).items():
        by_task.setdefault(case.task, {})[name] = case
    found: list[Part] = []
    for task, some in by_task.items():
        judge = {"text": _text, "capacity": _capacity, "needle": _needle, "kjv": _needle}.get(
            task, _answers
        )
        if task in ("main", "chunk") and recall_task(next(iter(some.values())), run.config) is None:
            judge = _text
        found += judge(run, some)
    return found


def _about(run: Run, some: Mapping[str, MemoryCase], chance: float) -> str:
    many, seeds = run.config.memory.sequences, len(run.arms[next(iter(some))])
    return f"{many} fresh sequences, chance {chance:.3f}, {seeds} seed(s)"


# Pairs
# -------------------------------------------------------------------------------------------------


def _answers(run: Run, some: Mapping[str, MemoryCase]) -> list[Measurement]:
    """The share of right answers of every arm of a task."""
    first = next(iter(some.values()))
    task = recall_task(first, run.config)
    assert task is not None
    many = run.config.memory.sequences
    found = [
        measure(f"answers {name}", answered, each(run.arms[name]), (task,), many) for name in some
    ]
    note, sent = _about(run, some, task.chance), first.task

    def rows(*shares: list[list[float]]) -> list[Row]:
        means = {n: [s[0] for s in seeds] for n, seeds in zip(some, shares, strict=True)}
        if sent == "chunk":
            return chunk_rows(some, means, note)
        return recall_rows(means, note)

    def plot(*shares: list[list[float]]) -> Any:
        means = {n: [s[0] for s in seeds] for n, seeds in zip(some, shares, strict=True)}
        return figures.answers(means, task.chance)

    title = "Chunks" if sent == "chunk" else "Recall"
    derived = derive(f"recall {sent}", *found, rows=rows, plot=plot, group=title)
    return [*found, derived]


def recall_rows(shares: Shares, note: str, task: str = "pairs") -> list[Row]:
    """A row for each arm, against attention where it was trained and learnt the task."""
    rows = []
    metric, best = "share of the answers that are right", shares.get("attention")
    if best is not None and np.mean(best) < 0.5:
        best = None
    for name, values in shares.items():
        if name == "attention" or best is None:
            text = f"{name} recalls {task}", metric, list(values), "of 1", ">= 0.95", "measured"
            rows.append(Row.judged(*text, note=note))
        else:
            claim = f"{name} recalls 90 % of attention's {task}"
            text = claim, metric, list(values), "of 1", "ratio >= 0.9", "measured"
            base = "attention", list(best)
            rows.append(Row.judged(*text, *base, note=note))
    return rows


def chunk_rows(some: Mapping[str, MemoryCase], shares: Shares, note: str) -> list[Row]:
    """What each kind loses from its smallest chunk to its largest, in points; two memories against
    one."""
    rows, lost = [], {}
    for kind in dict.fromkeys(case.kind for case in some.values()):
        own = {case.number: shares[name] for name, case in some.items() if case.kind == kind}
        small, large = min(own), max(own)
        points = [100 * (a - b) for a, b in zip(own[small], own[large], strict=True)]
        claim = f"{kind} with chunks of {large} recalls nearly what it does with {small}"
        metric, lost[kind] = "points of right answers lost", points
        rows.append(Row.judged(claim, metric, points, "points", "<= 5", "measured", note=note))
    if "two_memories" in lost and min(lost.get("lact", [0])) > 0:
        claim = "two memories lose at most half of what one loses to large chunks"
        both = [a / b for a, b in zip(lost["two_memories"], lost["lact"], strict=True)]
        metric = "points that they lose over those that LaCT loses"
        rows.append(Row.judged(claim, metric, both, "of 1", "<= 0.5", "measured", note=note))
    return rows


# Needles
# -------------------------------------------------------------------------------------------------


def _needle(run: Run, some: Mapping[str, MemoryCase]) -> list[Measurement]:
    """Needles at every depth, also in longer sequences than those of training."""
    m = run.config.memory
    longer = LONGER[: 1 if run.config.variant == "tiny" else None]
    bible = next(iter(some.values())).task == "kjv"
    length, what = (KJV, "digits of a needle in the Bible") if bible else (NEEDLE, "needles")
    tasks = tuple(ByteNeedle(KJV * n) if bible else WordNeedle(NEEDLE * n, 64) for n in longer)
    found = [
        measure(f"needles {name}", found_at, each(run.arms[name]), tasks, DEPTHS, m.sequences)
        for name in some
    ]
    reach = m.window * run.config.model.layers
    note = (
        f"{_about(run, some, tasks[0].chance)}; needle at the start of {length} tokens, beyond the "
        f"{reach} that {run.config.model.layers} windows of {m.window} reach"
    )
    kinds = [case.kind for case in some.values()]

    def rows(*heat: list[Any]) -> list[Row]:
        far = {k: [float(h[0][0]) for h in seeds] for k, seeds in zip(kinds, heat, strict=True)}
        return [*recall_rows(far, note, what), *least_attention(far, note)]

    def plot(*heat: list[Any]) -> Any:
        means = {k: np.mean(seeds, 0) for k, seeds in zip(kinds, heat, strict=True)}
        return figures.needles(means, [length * n for n in longer], DEPTHS)

    name, group = ("needles bible", "The Bible") if bible else ("needles", "Needles")
    return [*found, derive(name, *found, rows=rows, plot=plot, group=group)]


def least_attention(far: Shares, note: str) -> list[Row]:
    """The least share of attention layers with 90 % of what attention recalls."""
    if np.mean(far.get("attention", 0)) < 0.5 or not any("1to" in kind for kind in far):
        return []
    shares = {kind: ARMS[kind].count("attention") / len(ARMS[kind]) for kind in far}
    hybrids = {k: s for k, s in shares.items() if k != "window"}
    least = []
    for seed, whole in enumerate(far["attention"]):
        enough = [s for k, s in hybrids.items() if far[k][seed] >= RIGHT * whole]
        least.append(min(enough))
    claim = "a quarter of attention layers suffices for 90 % of all-attention recall"
    metric = "least share of attention layers, needles outside the windows"
    return [Row.judged(claim, metric, least, "of 1", "<= 0.25", "measured", note=note)]


# Pairs against bytes of state
# -------------------------------------------------------------------------------------------------


def _capacity(run: Run, some: Mapping[str, MemoryCase]) -> list[Measurement]:
    """Right answers of every kind, size and number of pairs."""
    m = run.config.memory
    task = recall_task(next(iter(some.values())), run.config)
    assert isinstance(task, MixedPairs)
    pairs = sorted(task.pairs)
    tasks = tuple(task.with_pairs(p) for p in pairs)
    found = [
        measure(f"pairs {name}", answered, each(run.arms[name]), tasks, m.sequences)
        for name in some
    ]
    note = f"{_about(run, some, task.chance)}; one layer, {task.length} tokens, pairs {pairs}"

    def table(shares: Sequence[Any]) -> dict[str, dict[int, np.ndarray]]:
        """[seeds, pairs] of every kind and size."""
        by_kind: dict[str, dict[int, np.ndarray]] = {}
        for case, seeds in zip(some.values(), shares, strict=True):
            by_kind.setdefault(case.kind, {})[case.number] = np.asarray(seeds)
        return by_kind

    def rows(*shares: Any) -> list[Row]:
        by_kind = table(shares)
        return [*capacity_rows(by_kind, pairs, note), lact_or_gdn(by_kind, pairs, note)]

    def plot(*shares: Any) -> Any:
        return figures.capacity(table(shares), pairs)

    return [*found, derive("capacity", *found, rows=rows, plot=plot, group="Capacity")]


def held(shares_P: np.ndarray, pairs: Sequence[int]) -> float:
    """Pairs up to which 90 % of the answers are right, between the numbers tried: by the
    logarithm; never fewer than half the least or more than the most."""
    logs = np.log([pairs[0] / 2, *pairs])
    values = np.minimum.accumulate([1.0, *shares_P])
    if values[-1] >= RIGHT:
        return float(pairs[-1])
    i = int(np.argmax(values < RIGHT))
    part = (values[i - 1] - RIGHT) / (values[i - 1] - values[i])
    return float(np.exp(logs[i - 1] + part * (logs[i] - logs[i - 1])))


def slope(kind: str, by_size: Mapping[int, np.ndarray], pairs: Sequence[int]) -> list[float]:
    """Of log pairs held against log bytes, of every seed."""
    sizes = sorted(by_size)
    x = np.log([state_bytes(kind, n) for n in sizes])
    seeds = range(len(by_size[sizes[0]]))
    ys = [[np.log(held(by_size[n][seed], pairs)) for n in sizes] for seed in seeds]
    return [float(np.polyfit(x, y, 1)[0]) for y in ys]


def capacity_rows(
    by_kind: Mapping[str, Mapping[int, np.ndarray]], pairs: Sequence[int], note: str
) -> list[Row]:
    """The slope of every kind; the keys of a state that is a matrix grow with its root."""
    rows = []
    for kind, by_size in by_kind.items():
        if len(by_size) < 2:
            continue
        most = {n: np.mean([held(s, pairs) for s in by_size[n]]) for n in sorted(by_size)}
        told = ", ".join(f"{p:.1f} at {state_bytes(kind, n):,} B" for n, p in most.items())
        claim = f"{kind} holds more pairs in a larger state"
        metric = "slope of log pairs at 90 % right against log bytes of state"
        text = claim, metric, slope(kind, by_size, pairs), "", ">= 0.5", "measured"
        rows.append(Row.judged(*text, note=f"{told}; {note}"))
    return rows


def lact_or_gdn(
    by_kind: Mapping[str, Mapping[int, np.ndarray]], pairs: Sequence[int], note: str
) -> Row:
    """LaCT minus Gated DeltaNet at equal bytes, where the latter is right 50 to 90 %: nearest to 70
    %."""
    metric = "share of right answers of LaCT minus that of Gated DeltaNet"
    end = "points", ">= 5", "measured"
    both = by_kind.get("gdn", {}).keys() & by_kind.get("lact", {}).keys()
    means = {(n, i): float(by_kind["gdn"][n][:, i].mean()) for n in both for i in range(len(pairs))}
    fair = {at: mean for at, mean in means.items() if 0.5 <= mean <= 0.9}
    if not fair:
        why = "Gated DeltaNet is right 50 to 90 % of the time at no size and number of pairs tried"
        return Row.untestable(LACT_GDN, metric, *end, why, decides=True)
    n, i = min(fair, key=lambda at: abs(fair[at] - 0.7))
    ours, theirs = by_kind["lact"][n][:, i], by_kind["gdn"][n][:, i]
    told = (
        f"{state_bytes('gdn', n):,} bytes, {pairs[i]} pairs: {ours.mean():.3f} and "
        f"{theirs.mean():.3f}; "
        f"over all {len(fair)} such cells "
        f"{100 * np.mean([by_kind['lact'][a][:, b].mean() - v for (a, b), v in fair.items()]):+.1f}"
        f" points; {note}"
    )
    points = [float(100 * x) for x in ours - theirs]
    return Row.judged(LACT_GDN, metric, points, *end, note=told, decides=True)


# Text
# -------------------------------------------------------------------------------------------------


def _text(run: Run, some: Mapping[str, MemoryCase]) -> list[Measurement]:
    """Held-out loss of every arm against attention."""
    found = [
        measure(f"validation loss {name}", validation_loss, each(run.arms[name])) for name in some
    ]
    kinds, task = [case.kind for case in some.values()], next(iter(some.values())).task
    note = f"{len(run.arms[next(iter(some))])} seed(s), {run.config.train.steps} steps"

    def rows(*losses: list[float]) -> list[Row]:
        by_kind = dict(zip(kinds, losses, strict=True))
        whole = by_kind.pop("attention", None)
        if whole is None:
            return []
        return [
            Row.judged(
                f"{kind} predicts text nearly as well as attention",
                "held-out loss",
                values,
                "nats/token",
                "ratio <= 1.01",
                "measured",
                "attention",
                whole,
                note=note,
            )
            for kind, values in by_kind.items()
        ]

    return [*found, derive(f"loss {task}", *found, rows=rows, group="Text")]
