"""Price of one layer of experts over ep: copies, bytes, buffers and seconds of each dispatch plan.

    python -m fdp.price.moe --model=deepseek-v3 --cluster=h100:4x8 --tokens=4096 [--trace=FILE]

Plans and copies: `fdp.price.moe_traffic`; without a trace routing is uniform, with one
(`fdp.data.traces`) copies are counted, layer by layer and in steps of M·T tokens, and means are
shown. Seconds: `fdp.price.moe_matmul`, which states its error, and `fdp.price.network`; everything
waits for the fullest device. Gradients cost two forward passes of the matmuls, and an exchange each
way in bfloat16. Rows of flat and two_level arrive grouped by expert, so that counts are exchanged
first, in a step of its own. A TPU's torus is one node. All of it is simulated.

Legend: T tokens of a device, K choices a token, E experts, M devices over ep.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from tabulate import tabulate

from fdp import command
from fdp.data import traces
from fdp.data.expert_loads import loads
from fdp.keys import UserError
from fdp.price import hardware, moe_matmul, network, shapes
from fdp.price.hardware import Cluster, Nodes
from fdp.price.moe_traffic import (
    PLANS,
    WIRES,
    Copies,
    Exchange,
    PricedLayer,
    counted,
    exchanges,
    loaded,
    uniform,
)
from fdp.price.workload import Columns, Job, Plan, columns, job_on


class LayerPrice(NamedTuple):
    """A layer and plan. A token's copies that stay, leave the device and leave the node, and its
    bytes that leave the device, and both ways the node; buffers of the exchanges in bytes, filled
    and at most; exchanges one after the other; seconds; rows of the fullest device over the mean.
    """

    own: float
    node: float
    out: float
    bytes_out: float
    bytes_back: float
    bytes_backward: float
    bytes_between: float
    buffers: float
    most: float
    steps: float
    matmul: float
    forward: float
    backward: float
    fullest: float


def links(chip: str) -> network.LinkCoefficients:
    """Coefficients of a chip's network with the share of the NIC that kernels for dispatch reach.

    `fdp.price.network` knows other collectives between nodes from one congested cluster: 0.4 of
    that rate for an all-to-all over four nodes."""
    c = network.coefficients(chip)
    share = moe_matmul.document()["nic_share"] / c.all_to_all
    return dataclasses.replace(c, scale_out=share, congestion=0.0)


def _wire(layer: PricedLayer, plan: str, stages: Sequence[Exchange], row: int, back: bool) -> float:
    """Seconds one way; `row` bytes a row."""
    total = 0.0
    for x in stages:
        nbytes = row + (0 if back else x.beside)
        if plan == "gather":
            whole = layer.devices * layer.tokens * nbytes
            args = ("reduce_scatter" if back else "all_gather", whole, x.ranks, x.local)
            each = [network.collective_time(*args, c, links(c)) for c, _ in layer.chips]
        else:
            moved = (x.inside * nbytes, x.outside * nbytes, x.ranks, x.local)
            each = [network.exchange_time(*moved, c, links(c)) for c, _ in layer.chips]
        total += float(max(each))
    return total


def matmul_seconds(layer: PricedLayer, rows_M: np.ndarray, hidden: int = 0) -> float:
    """Forward seconds of the grouped matmuls of the slowest device."""
    s = layer.shape
    sizes = (s.width, hidden or s.moe_ffn, s.experts // layer.devices)
    return max(float(moe_matmul.seconds(c, rows_M[d], *sizes).max()) for c, d in layer.chips)


def price(layer: PricedLayer, routing: Copies, plan: str, overlap: float = 0.0) -> LayerPrice:
    """The price of `plan`; `overlap`: share of the shorter of matmuls and exchanges that the other
    one hides. Raises UserError for an unknown plan and as `exchanges` does."""
    if plan not in PLANS or not 0 <= overlap <= 1:
        raise UserError(
            f"plan={plan!r} is one of {', '.join(PLANS)}, and overlap={overlap} in [0, 1]"
        )
    stages, rows_M = exchanges(layer, routing, plan), routing.rows_MxM.sum(0)
    remote = [x.node + x.out for x in stages]
    out, back = (_wire(layer, plan, stages, row, way) for row, way in _ways(layer))
    there = out + (0.0 if plan == "gather" else _count_seconds(layer, stages))
    matmul = matmul_seconds(layer, rows_M)
    rows = layer.row_out + layer.row_back
    return LayerPrice(
        own=sum(x.own for x in stages),
        node=sum(x.node for x in stages),
        out=sum(x.out for x in stages),
        bytes_out=sum(n * (layer.row_out + x.beside) for n, x in zip(remote, stages, strict=True)),
        bytes_back=sum(remote) * layer.row_back,
        bytes_backward=2 * sum(remote) * layer.row_back,
        bytes_between=sum(x.out * (rows + x.beside) for x in stages),
        buffers=sum(x.held * (rows + x.beside) for x in stages),
        most=sum(x.most * (rows + x.beside) for x in stages),
        steps=2 * len(stages) + (0 if plan == "gather" else len(stages)),
        matmul=matmul,
        forward=_hidden(there + back, matmul, overlap),
        backward=_hidden(2 * back, 2 * matmul, overlap),
        fullest=float(rows_M.max() / max(rows_M.mean(), 1e-9)),
    )


def _count_seconds(layer: PricedLayer, stages: Sequence[Exchange]) -> float:
    """Seconds in which all ranks learn the rows that each expert gets of each device."""
    nbytes, total = 4 * layer.shape.experts * layer.devices, 0.0
    for x in stages:
        args = ("all_gather", nbytes, x.ranks, x.local)
        total += max(float(network.collective_time(*args, c, links(c))) for c, _ in layer.chips)
    return total


def _ways(layer: PricedLayer) -> list[tuple[int, bool]]:
    return [(layer.row_out, False), (layer.row_back, True)]


def _hidden(wire: float, matmul: float, overlap: float) -> float:
    return wire + matmul - overlap * min(wire, matmul)


def columns_of_loads(jobs: Sequence[Job], loads_JxE: Sequence[np.ndarray]) -> Columns:
    """Columns `routed_seconds` and `exchange_seconds` (N,) for `fdp.price.step_time`: forward pass
    of the grouped matmuls and exchange of rows out and back, of one expert layer and microbatch.

    Loads of each job are [..., E] in any unit; seconds are their mean. Rows are sent flat. Raises
    UserError for low precision, whose kernels are not in the table, and as `PricedLayer` does."""
    found = [_job_seconds(*pair) for pair in zip(jobs, loads_JxE, strict=True)]
    routed, exchange = np.array(found).reshape(-1, 2).T
    return {"routed_seconds": routed, "exchange_seconds": exchange}


def _job_seconds(job: Job, loads_xE: np.ndarray) -> np.ndarray:
    if job.precision not in ("bf16", "fp16"):
        raise UserError(f"precision={job.precision}: expert loads are priced in bf16, set that")
    p = job.plan
    local = max(int(min(p.ep, (job.domain or job.chip.domain) / p.etp)), 1)
    cluster = Cluster("experts", (Nodes(job.chip, -(-p.ep // local), local),))
    tokens = max(round(p.microbatch * job.seq / (p.cp * p.tp)), 1)
    layer = PricedLayer(job.shape, cluster, tokens, p.ep)
    found = []
    for loads_E in np.reshape(loads_xE, (-1, job.shape.experts)):
        routing = loaded(layer, loads_E)
        stages, rows_M = exchanges(layer, routing, "flat"), routing.rows_MxM.sum(0) * p.etp
        wire = sum(_wire(layer, "flat", stages, row, back) for row, back in _ways(layer))
        found.append((matmul_seconds(layer, rows_M, -(-job.shape.moe_ffn // p.etp)), wire))
    return np.mean(found, 0)


# The command
# -------------------------------------------------------------------------------------------------


def routings(
    layer: PricedLayer, found: traces.RoutingTrace | traces.ExpertCounts
) -> Iterable[Copies]:
    """Every layer of every step of M·T tokens in a trace; a shorter trace is one step, scaled. A
    token's device is the trace's, where it knows and has no more than ep, else its place."""
    if isinstance(found, traces.ExpertCounts):
        for loads_E in found.counts_LxE:
            yield loaded(layer, loads_E)
        return
    M, step = layer.devices, layer.devices * layer.tokens
    known = len(found.source_N) and found.source_N.min() >= 0 and found.source_N.max() < M
    for start in range(0, max(len(found.ids_NxLxK) // step, 1) * step, step):
        part = found.take(slice(start, start + step))
        n = len(part.source_N)
        source_N = part.source_N if known else np.arange(n) * M // max(n, 1)
        for i in range(part.ids_NxLxK.shape[1]):
            yield counted(layer, part.ids_NxLxK[:, i], source_N)


def step_seconds(layer: PricedLayer, loads_JxE: Iterable[np.ndarray]) -> list[float]:
    """Training step of the whole model, one sequence of T tokens a chip, for each of some loads."""
    from fdp.price import hybrid  # scipy: not for a mistake, nor for --help

    size = layer.cluster.size
    plan = Plan(dp=size, ep=layer.devices)
    job = dataclasses.replace(job_on(layer.shape, layer.cluster, size, layer.tokens), plan=plan)
    found = []
    for loads_xE in loads_JxE:
        x = columns([job]) | columns_of_loads([job], [loads_xE])
        found.append(float(hybrid.predict(hybrid.shipped(), x).time[0]))
    return found


def report(
    layer: PricedLayer, found: traces.RoutingTrace | traces.ExpertCounts | None, overlap: float
) -> str:
    """The table of plans, and below it what the seconds rest on."""
    each = list(routings(layer, found)) if found is not None else [uniform(layer)]
    plans = PLANS if each[0].device_MxM is not None else ("flat", "gather")
    prices = {plan: [price(layer, r, plan, overlap) for r in each] for plan in plans}
    rows = [_row(plan, LayerPrice(*np.mean(p, 0))) for plan, p in prices.items()]
    s = layer.shape
    groups, kept = layer.limit
    limit = f", {kept} of {groups} groups" if groups > 1 else ""
    how = f"uniform routing{limit}" if found is None else f"mean of {len(each)} routings of a trace"
    lines = [
        f"{s.name} on {layer.cluster.name}: ep {layer.devices} = {layer.nodes}·{layer.local} nodes "
        f"and devices in each, {layer.tokens} tokens a device, {layer.wire} out, bf16 back, {how}",
        tabulate(rows, HEADS, disable_numparse=True, stralign="right"),
    ]
    if len(plans) < len(PLANS):
        lines.append("two_level is not priced: it needs the choices of tokens, not counts alone")
    fullest = np.array([p.fullest for p in prices["flat"]])
    lines.append(
        f"fullest device over the mean {fullest.mean():.3f}, at most {fullest.max():.3f}; "
        f"matmuls {1e3 * np.mean([p.matmul for p in prices['flat']]):.3f} ms forward, simulated"
    )
    rows_M = np.stack([r.rows_MxM.sum(0) for r in each])
    for chip, devices in layer.chips:
        sizes = (s.width, s.moe_ffn, s.experts // layer.devices)
        near, median, p90 = moe_matmul.error(chip, rows_M[:, devices], *sizes)
        lines.append(f"{chip}: {near}, held-out |error| {median:.0%}, 90 % below {p90:.0%}")
    if found is not None:
        even, own = step_seconds(layer, (np.ones(s.experts), loads(found)))
        lines.append(f"training step {even:.4g} s with even loads, {own:.4g} s with these")
    return "\n".join(lines)


HEADS = (
    "plan", "own", "node", "out", "B out", "B back", "B backward", "B nodes", "MiB", "at most",
    "steps", "ms", "ms backward",
)  # fmt: skip


def _row(plan: str, p: LayerPrice) -> tuple[str, ...]:
    copies = (f"{n:.2f}" for n in (p.own, p.node, p.out))
    moved = (f"{n:,.0f}" for n in (p.bytes_out, p.bytes_back, p.bytes_backward, p.bytes_between))
    held = (f"{n / 2**20:,.0f}" for n in (p.buffers, p.most))
    seconds = (f"{1e3 * n:.3f}" for n in (p.forward, p.backward))
    return (plan, *copies, *moved, *held, f"{p.steps:.0f}", *seconds)


def declare(values: flags.FlagValues) -> None:
    """The flags of the command; not at import, or they would be flags of every other command."""
    name, number = flags.DEFINE_string, flags.DEFINE_integer
    note = "a published mixture of experts, or the workdir of a run"
    name("model", "deepseek-v3", note, flag_values=values)
    name("cluster", "h100:4x8", "nodes x chips, or a TPU slice v5p:4x4x4", flag_values=values)
    number("tokens", 4096, "tokens of a device", flag_values=values)
    number("ep", 0, "devices that share the experts; 0: all chips", flag_values=values)
    flags.DEFINE_enum("wire", "bf16", WIRES, "rows on their way out", flag_values=values)
    note = "share of the shorter of matmuls and exchanges that the other hides"
    flags.DEFINE_float("overlap", 0.0, note, flag_values=values)
    name("trace", None, "folder or file that fdp.data.traces reads", flag_values=values)


def run(f: flags.FlagValues, rest: Sequence[str]) -> None:
    """The command. Raises ValueError for what the user can fix."""
    command.refuse_arguments(["", *rest])
    shape, cluster = shapes.named(f.model), hardware.cluster(f.cluster)
    layer = PricedLayer(shape, cluster, f.tokens, f.ep or cluster.size, f.wire)
    layout = traces.Layout(shape.experts, shape.moe_layers, shape.topk)
    print(report(layer, traces.read(Path(f.trace), layout) if f.trace else None, f.overlap))


def main(argv: Sequence[str]) -> None:
    """`run` on the process's flags."""
    run(flags.FLAGS, argv[1:])


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main, None, ValueError)
