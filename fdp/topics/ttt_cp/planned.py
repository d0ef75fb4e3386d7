"""How each layer of a hybrid communicates over the same devices, planned from the layers' counts.

Every layer is priced under every plan that it can run, the plan `tp` (heads over the same devices,
sequence-parallel between layers) among them. Short convolutions, norms and weight gradients are
left out: all plans share them, or nearly.

Legend: S positions, n devices, c tokens of a chunk, u devices that share heads."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fdp.count.context import hop_count
from fdp.count.counts import EXCHANGE, GATHER, PERMUTE, REDUCE, SCATTER, Rows, Sent
from fdp.kernels_pallas.newton_schulz import QUINTICS
from fdp.mesh import AXES
from fdp.models.attention import Attention, Softmax
from fdp.models.lact import LaCT
from fdp.models.recurrent import GatedDeltaNet, StateLayer
from fdp.models.shape import ModelShape
from fdp.models.ttt import TTTMLP, TTTLinear
from fdp.parallel.context import layer_plans, layouts
from fdp.parallel.context.layer_plans import Devices, HybridPlan, LayerOption, Transfer
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout
from fdp.parallel.context.plan import CommPlan, needed_hops
from fdp.parallel.context.planner_machine import INFINIBAND, NVLINK, Fabric, machine
from fdp.parallel.context.state import StatePlan
from fdp.parallel.masks import Mask
from fdp.price import hardware, inference, network
from fdp.study.figures import figure, legend
from fdp.study.measure import Part, derive
from fdp.study.report import Row

KINDS = ("attention", "window", "gdn", "ttt_linear", "ttt_mlp", "lact", "lact_muon")
ATTENTION = ("attention", "window")
HYBRIDS = tuple((state,) * n + ("attention",) for state in ("gdn", "lact_muon") for n in (1, 3, 7))
LENGTHS, FABRICS, CP = (2**17, 2**20), (NVLINK, INFINIBAND), 8
PERIODS = 4  # of a judged hybrid: the first and last layouts are free, those between are not
HEAD, LARGE_HEAD = 128, 512  # of LaCT: its state is a network of a whole head
# Plans of the baselines: by type of layer, and of one family.
PARTS = ("affine", "affine+scan", "tokens", "tokens+ns", "wavefront")
FIXED = {"ring + affine": ("ring", "heads", *PARTS), "all-to-all": ("ulysses", "heads")}
FAMILIES = FIXED | {
    "tp": ("tp",),
    "parts of the sequence": ("ring", "all_gather", "usp", *PARTS),
    "two levels": ("usp", "affine", "affine+scan", "heads+tokens", "wavefront"),
}
Priced = tuple[list[LayerOption], dict[str, str]]


@dataclass(frozen=True)
class HybridJob:
    """One sequence of `length`, layers of `width`, on `devices`; `chunk` of LaCT; positions of
    a `window`."""

    width: int
    length: int
    devices: int
    chunk: int = 16_384
    window: int = 4096

    @property
    def hidden(self) -> float:
        """Bytes of the hidden states of a device."""
        return self.length // self.devices * self.width * 2

    def degrees(self, axis: str) -> dict[str, int]:
        """All devices along one axis."""
        return dict.fromkeys(AXES, 1) | {axis: self.devices}

    def shape(self, kind: str) -> ModelShape:
        """bf16 layers; four query heads a key head."""
        large = kind.startswith("lact")
        heads = max(self.width // (LARGE_HEAD if large else HEAD), 1)
        keys = heads // 4 if heads % 4 == 0 else heads
        sizes = 1, self.width, heads, keys, self.width // heads, 4 * self.width, 32_000
        return ModelShape(*sizes, dtype="bfloat16", sequence_parallel=True)


@lru_cache
def options(kind: str, job: HybridJob, chunked: bool) -> Priced:
    """(what a layer can run, why it cannot run the rest). `chunked`: whether some layer of the
    hybrid shares out its chunks, whose layout is then one of those that are tried."""
    found: list[LayerOption] = []
    lost: dict[str, str] = {}
    places = [CONTIGUOUS, ZIGZAG]
    if chunked and job.chunk % job.devices == 0:
        places.append(SequenceLayout("striped", job.chunk // job.devices))
    price = _attention if kind in ATTENTION else _state
    for plan in _plans(kind, job, places):
        try:
            found.append(price(kind, plan, job))
        except ValueError as error:
            lost[f"{_named(plan[0], plan[2])} {plan[1].kind}"] = str(error)
    return found, lost


def _plans(
    kind: str, job: HybridJob, places: Sequence[SequenceLayout]
) -> Iterator[tuple[str, SequenceLayout, int]]:
    """(plan, layout, devices that share heads or pieces of a wavefront)."""
    yield "tp", CONTIGUOUS, job.devices
    splits = [u for u in range(2, job.devices) if job.devices % u == 0]
    for at in places:
        if kind in ATTENTION:
            yield from (("ring", at, 1), ("all_gather", at, 1), ("ulysses", at, job.devices))
            yield from (("usp", at, u) for u in splits)
        else:
            made = _layer(kind, StatePlan(), job)
            # Two levels of devices that share heads, and pieces of a wavefront, in some sizes.
            halves = [made.shape.heads >> i for i in range(made.shape.heads.bit_length())]
            sizes = {"heads+tokens": splits, "wavefront": [m for m in halves if m > 1]}
            for plan in made.kinds:
                yield from ((plan, at, many) for many in sizes.get(plan, [1]))


def _named(plan: str, many: int) -> str:
    letter = {"usp": "u", "heads+tokens": "u", "wavefront": "m"}.get(plan)
    return f"{plan} {letter}={many}" if letter else plan


def _attention(kind: str, way: tuple[str, SequenceLayout, int], job: HybridJob) -> LayerOption:
    plan, layout, u = way
    shape, degrees = job.shape(kind), job.degrees("tp" if plan == "tp" else "cp")
    _check_heads(plan, shape.kv_heads, job)
    mask = Mask("causal", window=job.window if kind == "window" else 0)
    over_cp = _over_cp(plan, layout, u, mask, job)
    core = Softmax(mask, over_cp)
    core.check(shape, 1, job.length, degrees)
    rows, n = Rows(1, job.length, 0), job.devices
    made = Attention(shape, core, parent=None).counts(rows, degrees)
    inner, seen = core.counts(shape, rows, degrees), _seen(layout, job.length, n, u, mask.window)
    hops = hop_count(over_cp, n)
    hidden = {PERMUTE: hops / (hops + 1), GATHER: 1 / n, SCATTER: 1 / n}
    transfers = []
    for sent, work in (
        (made.forward.sent, inner.forward.flops),
        (made.backward.sent, inner.backward.flops + inner.again.flops),
    ):
        behind = {op: work * seen / n * share for op, share in hidden.items() if plan != "tp"}
        transfers += _transfers(sent, {PERMUTE: hops, EXCHANGE: 2}, behind, n, over_cp.head_split)
    skipped = inner.executed(degrees) * (1 - seen)
    name = _named(plan, u)
    if over_cp.hops is not None:
        name += f" hops={hops}"
    flops = (made.executed(degrees) - skipped) / n
    return LayerOption(name, layout, flops, tuple(transfers), made.saved + made.live)


def _over_cp(plan: str, layout: SequenceLayout, u: int, mask: Mask, job: HybridJob) -> CommPlan:
    """What attention sends. A ring fetches only the keys of devices that the mask reaches."""
    if plan == "tp":
        return CommPlan("ring", layout=layout)
    found = CommPlan(plan, u, layout=layout)
    if not mask.window or found.ring_degree(job.devices) == 1:
        return found
    hops = needed_hops(mask, layout, job.length, job.devices, u)
    return found if len(hops) == job.devices // u - 1 else replace(found, hops=hops)


def _state(kind: str, way: tuple[str, SequenceLayout, int], job: HybridJob) -> LayerOption:
    plan, layout, many = way
    degrees, n = job.degrees("tp" if plan == "tp" else "cp"), job.devices
    u, pieces = (many if plan == name else 1 for name in ("heads+tokens", "wavefront"))
    made = _layer(kind, StatePlan("heads" if plan == "tp" else plan, layout, u, pieces), job)
    _check_heads(plan, made.shape.heads, job)
    made.check(1, job.length, degrees)
    rows = Rows(1, job.length, 0)
    found = made.counts(rows, degrees)
    hops = made.plan.scan_steps(n) if plan == "affine+scan" else made.plan.ticks(n)
    times, hidden = {EXCHANGE: 2, PERMUTE: hops}, {}
    if "tokens" in plan:
        updates = max(-(-job.length // job.chunk) - 1, 1)
        times |= {REDUCE: updates, SCATTER: updates, GATHER: updates}
        share = reading(made, job) / n
        hidden = {REDUCE: share, SCATTER: share / 2, GATHER: share / 2}
    passes = (found.forward.sent, found.backward.sent, found.again.sent)
    transfers = [t for sent in passes for t in _transfers(sent, times, hidden, n, u)]
    inner = made.work(rows, degrees).executed(degrees) - _scalars(made, rows)
    costs = found.executed(degrees) / n, tuple(transfers), found.saved + found.live
    return LayerOption(_named(plan, many), layout, *costs, inner / n, _chain(made, plan, job))


def _chain(made: StateLayer, plan: str, job: HybridJob) -> int:
    """Steps that wait for each other, forward and backward: chunks, and the products of
    Newton-Schulz in each."""
    chunks, n = -(-job.length // made.chunk), job.devices
    if plan == "affine":  # the map of the device's range, those of all, and what is read
        return 2 * (2 * (chunks // n) + n)
    if plan == "affine+scan":  # two compositions a step, but in the first
        return 2 * (2 * (chunks // n) + 2 * (made.plan.scan_steps(n) - 1))
    if plan == "wavefront":
        return 2 * made.plan.ticks(n) * (chunks // n)
    return 2 * chunks * (1 + 3 * len(QUINTICS) * getattr(made, "muon", False))


def _scalars(made: StateLayer, rows: Rows) -> int:
    """FLOPs of the numbers that a layer computes of each token and head."""
    many = {GatedDeltaNet: 2, TTTLinear: 1, TTTMLP: 1, LaCT: 4}[type(made)]
    return made.scalars(many, rows).flops


def reading(made: StateLayer, job: HybridJob) -> float:
    """FLOPs of all devices that read the chunks: what does not wait for the sum of an update. A
    single chunk is only read."""
    alone, one = dict.fromkeys(AXES, 1), Rows(1, job.chunk, 0)
    each = made.work(one, alone).forward.flops - _scalars(made, one) // 3
    return each * max(job.length // job.chunk - 1, 0)


def _layer(kind: str, plan: StatePlan, job: HybridJob) -> StateLayer:
    shape = job.shape(kind)
    if kind == "gdn":
        return GatedDeltaNet(shape, plan, 64, parent=None)
    if kind in ("ttt_linear", "ttt_mlp"):
        cls = TTTLinear if kind == "ttt_linear" else TTTMLP
        return cls(shape, plan, 16, parent=None)
    return LaCT(shape, plan, job.chunk, hidden=1, muon=kind == "lact_muon", parent=None)


def _check_heads(plan: str, heads: int, job: HybridJob) -> None:
    if plan == "tp" and heads % job.devices:
        raise ValueError(
            f"heads = {heads} are not divisible by tp = {job.devices}: take fewer devices"
        )


def _transfers(
    sent: Sent, times: Mapping[str, int], hidden: Mapping[str, float], n: int, u: int
) -> list[Transfer]:
    """`u` > 1: neighbours exchange heads, and everything else is sent among n / u groups of them.
    Heads may also be exchanged among all `n` devices."""
    found = []
    for (op, _), wire in sent.items():
        inside = op == EXCHANGE and u > 1
        among = (u, 1) if inside else (n // u, u)
        found.append(Transfer(op, wire, max(times.get(op, 1), 1), hidden.get(op, 0.0), *among))
    return found


@lru_cache
def _seen(layout: SequenceLayout, length: int, n: int, u: int, window: int = 0) -> float:
    """Share of all pairs that the busiest group of `u` devices computes under a causal mask, times
    n / u. `window`: of the mask, in positions; 0: no limit."""
    most = window or length
    means = [np.minimum(layouts.held(layout, length // n, n, i) + 1, most).mean() for i in range(n)]
    return float(np.reshape(means, (-1, u)).mean(1).max()) / length


# Plans and baselines
# -------------------------------------------------------------------------------------------------


def choices(kinds: Sequence[str], job: HybridJob) -> list[list[LayerOption]]:
    """What every layer can run."""
    chunked = any(kind.startswith("lact") for kind in kinds)
    return [options(kind, job, chunked)[0] for kind in kinds]


def uniform(
    every: Sequence[Sequence[LayerOption]], plans: Sequence[str], on: Devices, hidden: float
) -> HybridPlan | None:
    """The best where layers keep to `plans` and to one layout; None where that cannot run."""
    found = []
    for layout in {option.layout for of_layer in every for option in of_layer}:
        kept = [
            [o for o in of_layer if o.plan.split()[0] in plans and o.layout == layout]
            for of_layer in every
        ]
        if all(kept) and all(min(o.memory for o in of) <= on.memory for of in kept):
            found.append(layer_plans.best(kept, on, hidden))
    return min(found, key=lambda plan: plan.seconds, default=None)


def devices(fabric: Fabric, count: int, chip: str = "h100") -> Devices:
    """Chips of one kind. A layer may keep what a chip holds: layers are recomputed one by one. A
    step of a chain takes a kernel, at least."""
    return Devices(machine(fabric, chip), count, hardware.chip(chip).hbm_bytes, inference.KERNEL)


def baselines(
    every: Sequence[Sequence[LayerOption]], on: Devices, hidden: float
) -> dict[str, HybridPlan]:
    """The fixed recipes and the families, those that can run."""
    found = {name: uniform(every, plans, on, hidden) for name, plans in FAMILIES.items()}
    return {name: plan for name, plan in found.items() if plan}


def all_attention(job: HybridJob, count: int, on: Devices) -> dict[str, HybridPlan]:
    """`count` layers of attention in place of a hybrid: on rings, and by the best split of heads
    and rings."""
    every = choices(["attention"] * count, job)
    plans = {"ring": ("ring",), "best USP": ("usp", "ulysses")}
    found = {name: uniform(every, kept, on, job.hidden) for name, kept in plans.items()}
    return {name: plan for name, plan in found.items() if plan}


def ahead(kinds: Sequence[str], length: int, fabric: Fabric) -> float:
    """Seconds of the fastest baseline over those of the plan, less 1."""
    job = HybridJob(4096, length, CP)
    on, every = devices(fabric, CP), choices([*kinds] * PERIODS, job)
    rivals = baselines(every, on, job.hidden)
    found = layer_plans.best(every, on, job.hidden)
    return min(plan.seconds for plan in rivals.values()) / found.seconds - 1


def evidence(crosses: bool, chip: str = "h100") -> str:
    """What a simulated row says of its calibration."""
    rate = float(np.atleast_1d(machine(NVLINK, chip).flops)[0])
    try:
        median, p90 = network.held_out_error(chip, small=False, crosses=crosses)
        links = (
            f"collectives' |error| on classes left out of the fit: median {median:.0%}, 90 % "
            f"quantile {p90:.0%}; products at the rate of attention's fit"
        )
    except ValueError:
        links = (
            f"nothing was measured on {chip}: the maker's bandwidths, latencies and shares of "
            "the peak as of other chips"
        )
        if hardware.chip(chip).scale_out_bandwidth is None:
            links += ", one axis of a torus"
    step = f"dependent steps of at least {1e6 * inference.KERNEL:.0f} µs"
    return f"{links}, {rate / 1e12:.0f} TFLOP/s; {step}"


def cells() -> dict[tuple[tuple[str, ...], int, str], float]:
    """`ahead` of all hybrids, lengths and networks."""
    return {
        (kinds, length, fabric.name): ahead(kinds, length, fabric)
        for kinds in HYBRIDS
        for length in LENGTHS
        for fabric in FABRICS
    }


def over_attention() -> dict[tuple[str, int], tuple[float, float]]:
    """(least, largest) seconds of attention in every layer over those of a planned hybrid, at every
    length and network, by plan of attention and state layers to one of attention."""
    found: dict[tuple[str, int], list[float]] = {}
    for kinds, length, fabric in itertools.product(HYBRIDS, LENGTHS, FABRICS):
        job, on, layers = HybridJob(4096, length, CP), devices(fabric, CP), [*kinds] * PERIODS
        mine = layer_plans.best(choices(layers, job), on, job.hidden).seconds
        for name, plan in all_attention(job, len(layers), on).items():
            found.setdefault((name, len(kinds) - 1), []).append(plan.seconds / mine)
    return {key: (min(gains), max(gains)) for key, gains in found.items()}


def exposed(fabric: Fabric) -> tuple[float, float, dict[int, float]]:
    """(c*, c* at the bandwidth that the fit reaches, exposed share of the FLOP time of LaCT with
    Muon under `tokens+ns` at 1M, by chunk). c* = 4 (cp - 1) · FLOP/s / the links' bytes/s."""
    on, found = devices(fabric, CP), {}
    chip, fit = hardware.chip("h100"), network.coefficients("h100")
    inside = fabric.local >= CP
    link = chip.scale_up_bandwidth if inside else chip.scale_out_bandwidth
    assert link is not None
    for chunk in (2**n for n in range(11, 20)):
        job = HybridJob(4096, LENGTHS[-1], CP, chunk)
        way = "tokens+ns", SequenceLayout("striped", chunk // CP), 1
        option = _state("lact_muon", way, job)
        found[chunk] = on.exposed(option) / on.compute(option)
    least = 4 * (CP - 1) * float(np.atleast_1d(on.machine.flops)[0]) / link
    return least, least / (fit.all_gather * (1.0 if inside else fit.scale_out)), found


def hidden_sums() -> list[Row]:
    """What compute does not hide from c* on."""
    rows = []
    for fabric in FABRICS:
        least, reached, found = exposed(fabric)
        said = ", ".join(f"{c // 1024}K {100 * x:.1f}" for c, x in found.items())
        later = 100 * max(x for c, x in found.items() if c >= reached)
        rows.append(
            Row.judged(
                f"sums of updates hide behind reading from c* on, {fabric.name}",
                "largest exposed share of a layer's FLOP time",
                100 * max(x for c, x in found.items() if c >= least),
                "%",
                "<= 3",
                "simulated",
                note=f"tokens+ns, 1M tokens, cp {CP}, c* = {least:,.0f} by the links' figures; "
                f"from {reached:,.0f}, by the bandwidth of the fit, {later:.1f} %; % by chunk: "
                f"{said}; {evidence(fabric.local < CP)}",
            )
        )
    return rows


def judged() -> list[Row]:
    """Whether the planner is ever behind, and how often it is well ahead."""
    gains = list(cells().values())
    share = sum(gain >= 0.1 for gain in gains) / len(gains)
    cases = f"{len(HYBRIDS)} hybrids of {PERIODS} periods, 128K and 1M, cp {CP}, width 4096"
    note = f"{cases}; {evidence(True)}"
    return [
        Row.judged(
            "a plan for every layer is never behind fixed recipes and single families",
            "least gain over the fastest of them",
            round(100 * min(gains), 6),
            "%",
            ">= 0",
            "simulated",
            note=note,
        ),
        Row.judged(
            "a plan for every layer is 10 % ahead of fixed recipes and single families in a third "
            "of the cases",
            f"share of {len(gains)} cases",
            share,
            "",
            ">= 0.333",
            "simulated",
            note=f"largest gain {100 * max(gains):.1f} %; {note}",
        ),
        _against_attention(note),
    ]


def _against_attention(note: str) -> Row:
    found = over_attention()
    said = ", ".join(
        f"1:{many} over {name} {low:.2f} to {high:.2f}"
        for (name, many), (low, high) in found.items()
    )
    return Row.judged(
        "a planned hybrid takes less time than attention in every layer, on rings or by the best "
        "USP",
        "least speed-up of the layers that mix positions",
        min(low for low, _ in found.values()),
        "×",
        ">= 1",
        "simulated",
        note=f"attention to state layers: {said}; {note}",
    )


def shares_drawn() -> Mapping[str, object]:
    """The exposed share against the chunk, c* marked."""
    fig, axes = figure(width=7.0)
    for i, fabric in enumerate(FABRICS):
        least, found = exposed(fabric)[::2]
        axes.semilogx(
            list(found), [100 * x for x in found.values()], color=f"C{i}", label=fabric.name
        )
        axes.axvline(least, color=f"C{i}", linestyle=":", label=f"c*, {fabric.name}")
    axes.set(
        xlabel="tokens of a chunk, c",
        ylabel="exposed, % of the layer's FLOP time",
        title=f"Sums of updates at 1M tokens, cp {CP}, simulated",
    )
    legend(fig)
    return {"exposed against chunk": fig}


def plan_drawn() -> Mapping[str, object]:
    """Seconds of each layer of a hybrid, with its plan; a line where the layout changes."""
    kinds, fabric, job = HYBRIDS[2], INFINIBAND, HybridJob(4096, LENGTHS[0], CP)
    on = devices(fabric, CP)
    found = layer_plans.best(choices(kinds, job), on, job.hidden).layers
    fig, axes = figure(width=7.0)
    names = [
        f"{i} {k}: {o.plan}, {o.layout.kind}"
        for i, (k, o) in enumerate(zip(kinds, found, strict=True))
    ]
    compute = [1e3 * on.compute(o) for o in found]
    axes.barh(names, compute, label="compute")
    axes.barh(names, [1e3 * on.exposed(o) for o in found], left=compute, label="exposed")
    for i, (a, b) in enumerate(itertools.pairwise(found)):
        if a.layout != b.layout:
            axes.axhline(i + 0.5, color="#444444", linestyle=":", label="move of hidden states")
    axes.invert_yaxis()
    axes.set(xlabel="ms, simulated", title=f"128K tokens, cp {CP}, {fabric.name}")
    legend(fig)
    return {"plan of a hybrid": fig}


def parts() -> list[Part]:
    """Rows; nothing is run."""
    return [
        derive("planned", rows=judged, plot=plan_drawn, group="Cost"),
        derive("hidden sums", rows=hidden_sums, plot=shares_drawn, group="Cost"),
    ]
