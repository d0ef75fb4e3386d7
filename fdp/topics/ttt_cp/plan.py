"""The command: how each layer of a hybrid should communicate over a cluster.

    python -m fdp.topics.ttt_cp.plan --layers="gdn*3,attention" --width=4096 --seq=1048576 \\
        --cluster=h100:2x8

All devices share one sequence, bf16. Milliseconds are simulated, forward and backward."""

import math
from collections.abc import Sequence

from absl import flags
from tabulate import tabulate

from fdp import command
from fdp.keys import UserError, closest
from fdp.parallel.context import layer_plans
from fdp.parallel.context.layer_plans import Devices, HybridPlan, LayerOption
from fdp.parallel.context.planner_machine import Fabric
from fdp.price import hardware
from fdp.topics.ttt_cp import planned
from fdp.topics.ttt_cp.planned import HEAD, KINDS, LARGE_HEAD, HybridJob

MOST = 256  # layers of one call
LONGEST, WIDEST = 2**24, 2**17  # positions; the planner looks at each


def declare(values: flags.FlagValues) -> None:
    """The flags of the command; not at import, or they would be flags of every other command."""
    word, number = flags.DEFINE_string, flags.DEFINE_integer
    names = ", ".join(KINDS)
    word("layers", "gdn*3,attention", f"kinds with repeats, of {names}", flag_values=values)
    number("width", 4096, "of the hidden states", flag_values=values)
    number("seq", 2**20, "tokens of the sequence", flag_values=values)
    number("chunk", 16_384, "of LaCT, in tokens", flag_values=values)
    number("window", 4096, "positions that a layer of kind window reads", flag_values=values)
    word(
        "cluster",
        "h100:2x8",
        "nodes x chips of one kind, or a TPU slice v5p:4x4",
        flag_values=values,
    )


def layers(text: str) -> tuple[str, ...]:
    """The kinds of all layers. Raises UserError for what is none."""
    found: list[str] = []
    for part in text.split(","):
        kind, star, many = (word.strip() for word in part.partition("*"))
        if kind not in KINDS:
            raise UserError(f"--layers={text}: {kind!r} is no layer; {closest(kind, KINDS)}")
        if star and not (many.isascii() and many.isdecimal() and 0 < int(many[:9]) <= MOST):
            raise UserError(
                f"--layers={text}: {many!r} in {part.strip()!r} is not 1 to {MOST}: write {kind}*3"
            )
        found += [kind] * int(many or 1)
    if len(found) > MOST:
        raise UserError(f"--layers={text} are {len(found)} layers > {MOST}: plan one period")
    return tuple(found)


def on(text: str) -> tuple[Devices, str]:
    """The devices of --cluster, and what their prices rest on. Raises UserError for what is no
    cluster of one chip."""
    try:
        cluster = hardware.cluster(text)
    except ValueError as error:
        raise UserError(f"--cluster={text}: {error}") from error
    if len(cluster.groups) > 1 or cluster.size < 2:
        raise UserError(
            f"--cluster={text} is {len(cluster.groups)} group(s) of {cluster.size} chip(s): take "
            "one group of at least 2, such as h100:2x8"
        )
    group, chip = cluster.groups[0], cluster.chip.name
    devices = planned.devices(Fabric("cluster", group.chips), cluster.size, chip)
    return devices, planned.evidence(group.count > 1, chip)


def job_of(width: int, length: int, chunk: int, count: int, window: int = 4096) -> HybridJob:
    """The job of the flags. Raises UserError where sizes do not divide."""
    if not 0 < width <= WIDEST or width % LARGE_HEAD:
        fix = min(max(-(-width // LARGE_HEAD), 1) * LARGE_HEAD, WIDEST)
        raise UserError(
            f"--width={width} is not divisible by heads of {LARGE_HEAD} and {HEAD}, or not within "
            f"1 to {WIDEST}: set --width={fix}"
        )
    unit = 2 * count
    if not 0 < length <= LONGEST or length % unit:
        whole = math.lcm(unit, chunk) if 0 < chunk <= length else unit  # whole chunks, too
        fix = min(max(-(-length // whole), 1), max(LONGEST // whole, 1)) * whole
        raise UserError(
            f"--seq={length} is not divisible by 2·devices = {unit}, or not within 1 to {LONGEST}: "
            f"set --seq={fix}"
        )
    if chunk < 1 or chunk % count or length % chunk:
        raise UserError(
            f"--chunk={chunk} must be divisible by {count} devices and divide --seq={length}: set "
            f"--chunk={_chunk(chunk, length, count)}"
        )
    if window < 1:
        raise UserError(f"--window={window} reads no position: set --window={min(4096, length)}")
    return HybridJob(width, length, count, chunk, min(window, length))


def _chunk(chunk: int, length: int, count: int) -> int:
    """The largest chunk up to `chunk` that devices and sequence allow; the smallest if none is."""
    fits = [length // k for k in range(1, length // count + 1) if length % (k * count) == 0]
    return max((c for c in fits if c <= chunk), default=min(fits, default=length))


def main(argv: list[str]) -> None:
    """Print the plan of every layer, and why the others lost."""
    command.refuse_arguments(argv)
    values = flags.FLAGS
    kinds, (devices, evidence) = layers(values.layers), on(values.cluster)
    job = job_of(values.width, values.seq, values.chunk, devices.count, values.window)
    every = planned.choices(kinds, job)
    try:
        found = layer_plans.best(every, devices, job.hidden)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(table(kinds, found, devices))
    moved = found.moves * devices.moved(job.hidden) / 2**20
    cost = 1e3 * found.moves * devices.move(job.hidden)
    print(f"\n{found.moves} moves between layouts: {moved:,.0f} MiB of a device, {cost:.4g} ms")
    print(f"{1e3 * found.seconds:,.4g} ms in all, simulated; {evidence}")
    for name, plan in planned.baselines(every, devices, job.hidden).items():
        print(f"{name} in one layout: {100 * (plan.seconds / found.seconds - 1):+.1f} %")
    for name, plan in planned.all_attention(job, len(kinds), devices).items():
        print(f"attention in every layer, {name}: {1e3 * plan.seconds:,.4g} ms")
    print("\nWhy others lost")
    chunked = any(kind.startswith("lact") for kind in kinds)
    for kind in dict.fromkeys(kinds):
        _print_lost(kind, found.layers[kinds.index(kind)], job, devices, chunked)


def table(kinds: Sequence[str], found: HybridPlan, devices: Devices) -> str:
    """A line a layer."""
    lines = [
        (i, kind, o.plan, o.layout.kind, o.wire / 2**20, o.steps, *_milliseconds(o, devices))
        for i, (kind, o) in enumerate(zip(kinds, found.layers, strict=True))
    ]
    heads = ("layer", "kind", "plan", "layout", "MiB sent", "steps", "compute ms", "exposed ms")
    return tabulate(lines, heads, floatfmt=",.4g")


def _milliseconds(option: LayerOption, devices: Devices) -> tuple[float, float]:
    return 1e3 * devices.compute(option), 1e3 * devices.exposed(option)


def _print_lost(
    kind: str, mine: LayerOption, job: HybridJob, devices: Devices, chunked: bool
) -> None:
    found, refused = planned.options(kind, job, chunked)
    for option in found:
        if option == mine:
            continue
        more = 1e3 * (devices.seconds(option) - devices.seconds(mine))
        why = f"{more:+,.4g} ms" + ("" if option.layout == mine.layout else ", without moves")
        if option.memory > devices.memory:
            why = f"{option.memory / 2**30:.1f} GiB > {devices.memory / 2**30:.0f} GiB of a device"
        print(f"  {kind}, {option.plan} {option.layout.kind}: {why}")
    for name, why in refused.items():
        print(f"  {kind}, {name}: {why}")


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main)
