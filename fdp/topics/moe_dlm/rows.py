"""Rows of the report of topic 2.

Legend: M layers with experts, E experts, S steps of a sampler, P seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fdp.count.experts import Temporaries
from fdp.count.overlap import Overlap
from fdp.data.batches import Data
from fdp.data.synthetic import CHAINS
from fdp.price import hardware, moe, moe_traffic, shapes
from fdp.study.report import Row
from fdp.topics.moe_dlm.observe import RANKS, Observed, Sampled
from fdp.topics.moe_dlm.settings import BASELINES, NOISE_AWARE, SEVERAL_NODES

MODEL, CLUSTER = "llada-moe-7b-a1b", "h100:1x8"
TOKENS = 4096  # of a device in a priced sampling step
STANDARD_ERRORS = 3.0
CHOSEN_ON = 2  # first seeds, on which the baseline is chosen
RANK_PAIRS = {"film_rank": "film", "low_rank_rank": "low_rank"}

Seeds = Sequence[Observed]


def nelbo(found: Seeds) -> np.ndarray:
    """Of every seed."""
    return np.array([f.nelbo for f in found])


def batch_mates(found: tuple[int, int]) -> Row:
    """Choices that change with the rest of the batch."""
    wrong, total = found
    claim = "a sample's experts do not depend on its batch mates"
    note = f"{total:,} choices of trained routers"
    return Row.judged(claim, "choices that differ", wrong, "", "== 0", "measured", note=note)


# One task
# -------------------------------------------------------------------------------------------------


def task(
    name: str, arms: Sequence[str], data: Data, seen: Sequence[Seeds], drawn: Sequence[Any]
) -> list[Row]:
    """Likelihood, balance and information of every router on a task."""
    by_arm, along = dict(zip(arms, seen, strict=True)), dict(zip(arms, drawn, strict=True))
    found: list[Row] = []
    if name in CHAINS:
        floor = CHAINS[name].nll_floor(data.seq_len)
        worst = min(float(nelbo(s).min()) for s in seen)
        found.append(
            Row.judged(
                f"{name}: no NELBO is below the entropy of the chain",
                "lowest NELBO of an arm and seed",
                worst,
                "nats/token",
                f"value >= {floor * 0.99:.4g}",
                "measured",
                "exact entropy",
                floor,
                note="1 % for the finite validation data",
            )
        )
    for arm in arms:
        if arm in RANK_PAIRS and RANK_PAIRS[arm] in by_arm:
            found += _rank_rows(name, arm, by_arm, along)
    for arm in arms:
        if by_arm[arm][0].probe_Mx2.size:
            found.append(_probe_row(name, arm, by_arm[arm]))
    return found


def _rank_rows(
    name: str, arm: str, by_arm: Mapping[str, Seeds], along: Mapping[str, Sequence[Sampled]]
) -> list[Row]:
    """What the balance of ranks within noise bins costs and gives."""
    plain = RANK_PAIRS[arm]
    pairs = min(len(by_arm[arm]), len(by_arm[plain]))
    cost = nelbo(by_arm[arm])[:pairs] - nelbo(by_arm[plain])[:pairs]
    mine, theirs = ([seconds(s) for s in along[n][:pairs]] for n in (arm, plain))
    note = f"{MODEL} on {CLUSTER}, {TOKENS:,} tokens a device, experts only; {pairs} seed(s)"
    return [
        Row.judged(
            f"{name}: rank balance in noise bins costs {plain} no likelihood",
            f"NELBO of {arm} minus {plain}",
            list(cost),
            "nats/token",
            "value <= 0.002",
            "measured",
            note=f"{pairs} seed(s)",
        ),
        Row.judged(
            f"{name}: and shortens a sampling step at ep = 8",
            f"mean step of {arm}",
            mine,
            "s",
            "ratio <= 0.9",
            "simulated",
            f"{plain}, balanced over all noise",
            theirs,
            note=note,
        ),
    ]


def _probe_row(name: str, arm: str, found: Seeds) -> Row:
    """What a linear router could read of the noise; the rest of what was observed is its note."""
    probe_Mx2 = np.mean([f.probe_Mx2 for f in found], 0)
    information = np.mean([f.information_M for f in found], 0)
    overload, fan_out = np.mean([(f.overload, f.fan_out) for f in found], 0)
    layers = ", ".join(f"{a:.2f}/{b:.2f}" for a, b in probe_Mx2)
    told = ", ".join(f"{i:.3f}" for i in information)
    return Row.judged(
        f"{name}, {arm}: a linear probe reads the noise of a token",
        "R², the best layer and token state",
        float(probe_Mx2.max()),
        "",
        "value >= 0.5",
        "measured",
        note=f"masked/revealed by layer {layers}; I(expert; noise | masked) {told} nats; "
        f"{fan_out:.2f} of {RANKS} ranks a token; overload on mixed noise {overload:.2f}",
    )


def raw(arms: Sequence[str]) -> Callable[..., Any]:
    """The raw numbers of a task: by arm and seed."""
    return partial(_raw, tuple(arms))


def _raw(arms: Sequence[str], seen: Sequence[Seeds], drawn: Sequence[Sequence[Sampled]]) -> Any:
    found = {}
    for arm, observed, sampled in zip(arms, seen, drawn, strict=True):
        found[arm] = [
            {
                "nelbo": o.nelbo,
                "nelbo by noise": o.nelbo_J.tolist(),
                "information": o.information_M.tolist(),
                "probe": o.probe_Mx2.tolist(),
                "fan out": o.fan_out,
                "overload, mixed noise": o.overload,
                "overload by step": s.overload_S.tolist(),
            }
            for o, s in zip(observed, sampled, strict=True)
        ]
    return found


# The answer
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duel:
    """A noise-aware router against the best baseline of a task, on the seeds that did not choose
    it."""

    task: str
    arm: str
    baseline: str
    gain_P: np.ndarray  # NELBO of the baseline minus the arm's
    overload: float  # worst step's, over the baseline's
    steps: tuple[float, float]  # mean over the steps, of the arm and of the baseline

    @property
    def error(self) -> float:
        """Standard error of the mean gain; infinite for one seed."""
        n = len(self.gain_P)
        return float(self.gain_P.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf

    @property
    def score(self) -> float:
        """Mean gain in standard errors."""
        return float(self.gain_P.mean() / self.error)


def duels(
    names: Sequence[str], seen: Sequence[Seeds], drawn: Sequence[Sequence[Sampled]]
) -> list[Duel]:
    """Every noise-aware arm on every oracle."""
    by_name, along = dict(zip(names, seen, strict=True)), dict(zip(names, drawn, strict=True))
    found = []
    for task in dict.fromkeys(n.partition("-")[0] for n in names):
        base = [f"{task}-{b}" for b in BASELINES if f"{task}-{b}" in by_name]
        if not base:
            continue
        best = min(base, key=lambda n: nelbo(by_name[n])[:CHOSEN_ON].mean())
        for arm in (f"{task}-{a}" for a in NOISE_AWARE):
            if arm not in by_name:
                continue
            many = len(by_name[arm]) > CHOSEN_ON + 1
            judged = slice(CHOSEN_ON if many else 0, None)
            gain = nelbo(by_name[best])[judged] - nelbo(by_name[arm])[judged]
            worst = [float(np.mean([s.worst for s in along[n][judged]])) for n in (arm, best)]
            means = [float(np.mean([s.overload_S for s in along[n][judged]])) for n in (arm, best)]
            mine, theirs = (n.partition("-")[2] for n in (arm, best))
            ratio = worst[0] / max(worst[1], 1e-9)
            found.append(Duel(task, mine, theirs, gain, ratio, (means[0], means[1])))
    return found


def pays(
    names: Sequence[str], seen: Sequence[Seeds], drawn: Sequence[Sequence[Sampled]]
) -> list[Row]:
    """One row a duel and measure, and the verdict over all."""
    found = duels(names, seen, drawn)
    rows = []
    for d in found:
        against = f"best baseline on seeds 0–1: {d.baseline}; judged on {len(d.gain_P)} seed(s)"
        if math.isfinite(d.error):
            text = f"{against}; standard error {d.error:.4f} nats"
            rows.append(
                Row.judged(
                    f"{d.task}: {d.arm} lowers the NELBO",
                    "gain over the best baseline in standard errors",
                    d.score,
                    "",
                    f"value >= {STANDARD_ERRORS:g}",
                    "measured",
                    note=f"gain {d.gain_P.mean():+.4f} nats; {text}",
                    decides=True,
                )
            )
        rows.append(
            Row.judged(
                f"{d.task}: {d.arm} levels the worst step",
                "worst step's overload of the ranks of ep",
                d.overload,
                "",
                "value <= 0.5",
                "measured",
                note=f"over that of the baseline; {against}; where all is masked all tokens are "
                "alike, and every token's choice is the same",
            )
        )
        rows.append(
            Row.judged(
                f"{d.task}: {d.arm} levels the steps",
                "overload of the ranks of ep, mean over the steps of a sampler",
                d.steps[0],
                "",
                "ratio <= 0.5",
                "measured",
                f"{d.baseline}",
                d.steps[1],
                note=against,
            )
        )
    return [*rows, _verdict(found)]


def _verdict(found: Sequence[Duel]) -> Row:
    claim, metric = "noise-aware routing pays", "routers that win on an oracle and lose on none"
    note = (
        f"a win: NELBO lower by more than {STANDARD_ERRORS:g} standard errors of the paired "
        "difference; or a tie within 1 with at most half of the worst overload"
    )
    if any(not math.isfinite(d.error) for d in found):
        told = f"{note}; one seed has no standard error, run the variant full"
        return Row.untestable(claim, metric, "", "value >= 1", "measured", told, decides=True)
    winners = 0
    for arm in dict.fromkeys(d.arm for d in found):
        mine = [d for d in found if d.arm == arm]
        lower = any(d.score > STANDARD_ERRORS for d in mine)
        worse = any(d.score < -STANDARD_ERRORS for d in mine)
        ties = all(abs(d.score) <= 1 and d.overload <= 0.5 for d in mine)
        winners += (lower and not worse) or ties
    needed = [_seeds_for(d) for d in found]
    told = f"{note}; seeds for {STANDARD_ERRORS:g} standard errors at these gains: " + ", ".join(
        f"{d.task} {d.arm} {n}" for d, n in zip(found, needed, strict=True)
    )
    return Row.judged(claim, metric, winners, "", "value >= 1", "measured", note=told, decides=True)


def _seeds_for(d: Duel) -> str:
    gain = d.gain_P.mean()
    if gain <= 0:
        return "none (it is worse)"
    return str(math.ceil((STANDARD_ERRORS * d.gain_P.std(ddof=1) / gain) ** 2))


# Prices
# -------------------------------------------------------------------------------------------------


def _layer() -> Any:
    cluster = hardware.cluster(CLUSTER)
    return moe_traffic.PricedLayer(shapes.named(MODEL), cluster, tokens=TOKENS, devices=RANKS)


def seconds(found: Sampled) -> float:
    """Mean over the steps of a sampler of the seconds of all expert layers, the model's layers
    having the measured layers' shares of the load in turn."""
    layer = _layer()
    each = layer.shape.experts // found.load_SxMxE.shape[-1]
    total = 0.0
    for load_MxE in found.load_SxMxE:
        of_layer = [
            moe.price(layer, moe_traffic.loaded(layer, np.repeat(load_E, each)), "flat").forward
            for load_E in load_MxE
        ]
        total += float(np.mean(of_layer)) * layer.shape.moe_layers
    return total / len(found.load_SxMxE)


def plans() -> dict[str, tuple[float, float]]:
    """Bytes a token and layer, out and back, that every dispatch plan sends inside a node and
    between nodes at uniform routing."""
    model, cluster = shapes.named(SEVERAL_NODES[0]), hardware.cluster(SEVERAL_NODES[1])
    layer = moe_traffic.PricedLayer(model, cluster, TOKENS, cluster.size)
    prices = {p: moe.price(layer, moe_traffic.uniform(layer), p) for p in moe_traffic.PLANS}
    return {
        n: (p.bytes_out + p.bytes_back - p.bytes_between, p.bytes_between)
        for n, p in prices.items()
    }


def plan_rows(found: Mapping[str, tuple[float, float]]) -> Row:
    """What two levels save."""
    model, cluster = SEVERAL_NODES
    return Row.judged(
        "one copy a node sends fewer bytes between nodes than one a pair",
        "bytes a token and layer that leave the node, out and back",
        found["two_level"][1],
        "B",
        "ratio <= 0.5",
        "simulated",
        "flat",
        found["flat"][1],
        note=f"{model} on {cluster}, uniform routing",
    )


def memory(found: Mapping[str, Temporaries] | None) -> list[Row]:
    """Temporaries of an expert layer on a GPU."""
    claims = "the GPU's grouped products keep no dense buffer", "… and little beyond what they must"
    metrics = "temporaries of forward and backward, the worst of two shapes", "the same"
    limits = "ratio <= 0.25", "ratio <= 1.5"
    if found is None:
        needs = "needs the H100 compiler: pip install -e '.[aot]'"
        both = zip(claims, metrics, limits, strict=True)
        return [Row.untestable(c, m, "B", limit, "compiled", needs) for c, m, limit in both]
    rows = []
    bases = {"lax.ragged_dot": 1, "activations that the backward pass keeps": 2}
    for claim, metric, limit, (name, at) in zip(
        claims, metrics, limits, bases.items(), strict=True
    ):
        ratios = {n: f.ours / f[at] for n, f in found.items()}
        worst = max(ratios, key=ratios.__getitem__)
        each = "; ".join(f"{n} {ratio:.3f}" for n, ratio in ratios.items())
        numbers = found[worst].ours, "B", limit, "compiled", name, found[worst][at]
        rows.append(Row.judged(claim, metric, *numbers, note=f"bfloat16, one H100: {each}"))
    return rows


def beside(found: Mapping[str, Overlap]) -> Row:
    """Whether the shared expert can hide the exchange of rows."""
    claim = "the shared expert stands between start and done of a ragged all-to-all"
    metric, limit = "ragged all-to-alls of a layer with its product between", "value >= 1"
    if "h100" not in found:
        needs = "needs the H100 compiler: pip install -e '.[aot]'"
        return Row.untestable(claim, metric, "", limit, "compiled", needs)
    each = (f"{n}: {o.apart} of {o.total} asynchronous, {o.beside} so" for n, o in found.items())
    note = f"forward and backward, two nodes of eight devices: {'; '.join(each)}"
    return Row.judged(claim, metric, found["h100"].beside, "", limit, "compiled", note=note)
