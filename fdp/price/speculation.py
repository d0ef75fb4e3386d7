"""Seconds of speculative decoding on one node, simulated: passes are priced by
`fdp.price.inference`, and what is accepted comes from counted runs or from an acceptance rate.

A drafted step is right or not, whenever it is drafted: with shared noise that is a property of the
path (`fdp.sampling.speculative`, drafts of a model). A schedule is then a deterministic function of
which steps are right:

- sequential: draft k steps, verify k + 1 states, repeat. The draft has devices of its own, or all.
- overlap: the draft goes on from its own last state while the window is verified (post-verify), and
  the first state is judged while the rest is drafted (pre-verify), as in PEARL (Liu et al. 2024,
  arXiv 2408.11850).
- replicas: windows in flight on several verifiers, as in DSI (Timor et al. 2024, arXiv 2405.14105).

Self-drafting has no passes of a draft: its seconds are rounds times those of a window. A pass whose
result is not wanted any more is abandoned at once; ids that cross the link take no time.

Legend: B requests, N steps, k drafted steps, W = k + 1 states of a window, a acceptance rate.
"""

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from fdp.keys import UserError
from fdp.models.shape import ModelShape
from fdp.price import inference, network
from fdp.price.inference import LLADA_8B, Degrees, ForwardPass, PassTime

CHIP, DEVICES = "h100", 8


def draft_shape(layers: int) -> ModelShape:
    """A draft for LLaDA-8B: 0.84 B parameters at 16 layers, most of them embedding and head below
    12."""
    vocab = LLADA_8B.vocab
    return ModelShape(
        layers, 1536, 12, 12, 128, 4096, vocab, dtype="bfloat16", name=f"draft-{layers}"
    )


# Passes
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """What is decoded: `steps` tokens by passes of `rows` positions after a cached `prefix`, for
    `requests` at once."""

    name: str
    rows: int
    prefix: int = 0
    requests: int = 1

    @property
    def steps(self) -> int:
        """One token a step: as many as rows."""
        return self.rows

    def work(self, states: int) -> ForwardPass:
        """A pass over `states` of every request; they share its prefix."""
        many, keys = self.requests * states, self.prefix + self.rows
        return ForwardPass(many, self.rows, keys, self.rows, self.prefix, states)


WHOLE = tuple(Decoding(f"all rows, L = {L}", L) for L in (256, 1024))
BLOCKS = tuple(
    Decoding(f"block of 32 after {P // 1024}K", 32, P) for P in (2048, 4096, 8192, 16384, 32768)
)


@dataclass(frozen=True)
class Pass:
    """A priced pass, at the degrees that make it shortest."""

    seconds: float
    degrees: Degrees
    time: PassTime


@cache
def priced(
    shape: ModelShape, at: Decoding, states: int = 1, devices: int = DEVICES, chip: str = CHIP
) -> Pass:
    """The shortest pass over `states` of every request, of all {tp, dp} with tp · dp ≤ devices.
    Raises UserError for no state or no device."""
    if states < 1 or devices < 1:
        raise UserError(
            f"states = {states} on {devices} devices: a pass has at least one state and one device"
        )
    work, found = at.work(states), []
    for tp in range(1, devices + 1):
        if any(getattr(shape, n) % tp for n in ("heads", "kv_heads", "ffn", "vocab")):
            continue
        degrees = Degrees(tp, min(devices // tp, work.requests))
        time = inference.fastest(shape, work, degrees, chip)
        found.append(Pass(time.seconds, degrees, time))
    return min(found, key=lambda one: one.seconds)


def calibration(chip: str = CHIP) -> str:
    """What is known of the error of a pass's seconds."""
    try:
        (median, p90), small = (
            inference.matmul_error(chip),
            network.held_out_error(chip, small=True),
        )
    except ValueError as error:
        return f"not calibrated: {error}"
    return (
        f"|error| of the products' seconds: median {median:.0%}, 90 % quantile {p90:.0%}; of "
        f"collectives below 1 MiB left out of the fit: {small[0]:.0%}, {small[1]:.0%}; attention "
        "and elementwise kernels: not checked"
    )


def knee(shape: ModelShape, rows: int, tp: int, chip: str = CHIP) -> float:
    """States of `rows` positions on a replica at which the products of a layer take as long by
    FLOPs as by bytes: where more states stop being free. Products are weighted by their seconds."""

    def times(many: int) -> tuple[float, float]:
        work = ForwardPass(1, many, many, many)
        found = inference.matmuls(shape, work, Degrees(tp, 1))[:-1]
        each = [inference.matmul_bounds(m, n, k, chip, shape.itemsize) for m, n, k, _ in found]
        return sum(c for c, _ in each), sum(b for _, b in each)

    low, high = 1, 2**20
    while high - low > 1:
        middle = (low + high) // 2
        compute, memory = times(middle)
        low, high = (middle, high) if compute <= memory else (low, middle)
    return low / rows


def free_states(
    shape: ModelShape, at: Decoding, slack: float = 0.1, devices: int = DEVICES, chip: str = CHIP
) -> int:
    """Most states whose pass takes at most 1 + `slack` of one state's seconds."""
    one, states = priced(shape, at, 1, devices, chip).seconds, 1
    while priced(shape, at, states + 1, devices, chip).seconds <= (1 + slack) * one:
        states += 1
    return states


# What is accepted
# -------------------------------------------------------------------------------------------------


def tokens_a_round(a: float, k: int) -> float:
    """Mean progress of a round of k drafts, each right with probability a: (1 - a^(k+1)) / (1 - a).
    Raises UserError for a rate outside 0 to 1."""
    _check_rate(a)
    return k + 1.0 if a == 1 else (1 - a ** (k + 1)) / (1 - a)


def drawn(a: float, steps: int, requests: int = 1, seed: int = 0) -> np.ndarray:
    """Which drafted steps are right, each with probability a: bool [B, N]."""
    _check_rate(a)
    return np.random.default_rng(seed).random((requests, steps)) < a


def counted(taken_RxB: np.ndarray, k: int, steps: int) -> np.ndarray:
    """Which drafted steps are right, bool [B, N], from "taken" of `speculate` with windows of k + 1
    states. The step after a window without a rejection was not judged, and counts as right: draft
    all steps at once (k ≥ N) and none is left open."""
    right = np.ones((taken_RxB.shape[1], steps), bool)
    for b, row in enumerate(taken_RxB.T):
        position = 0
        for taken in row:
            if position >= steps:
                break
            if taken < k and position + taken < steps:
                right[b, position + taken] = False
            position += int(taken) + 1
    return right


def _check_rate(a: float) -> None:
    if not 0 <= a <= 1:
        raise UserError(f"acceptance rate a = {a}: 0 ≤ a ≤ 1 must hold; give a probability")


# Schedules
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Devices of the draft, and of each of the verifier's replicas. `shared`: the draft runs on the
    verifier's devices, and nothing overlaps. Raises UserError for more devices than exist."""

    draft: int
    verifier: int
    replicas: int = 1
    devices: int = DEVICES
    shared: bool = False

    def __post_init__(self) -> None:
        if min(self.draft, self.verifier, self.replicas) < 1:
            raise UserError(
                f"draft = {self.draft}, verifier = {self.verifier}, replicas = {self.replicas}: "
                "each needs at least 1"
            )
        if self.used > self.devices:
            raise UserError(
                f"devices = draft + replicas · verifier = {self.draft} + {self.replicas} · "
                f"{self.verifier} = {self.draft + self.replicas * self.verifier} exceed the "
                f"{self.devices} that exist: take fewer for one of them"
            )

    @property
    def used(self) -> int:
        """Devices that either needs."""
        own = self.replicas * self.verifier
        return max(self.draft, own) if self.shared else self.draft + own


@dataclass
class Timeline:
    """A simulated generation. windows: verified; firsts: states judged alone; runs: (resource,
    start, end) of everything that ran."""

    seconds: float = 0.0
    windows: int = 0
    firsts: int = 0
    runs: list[tuple[str, float, float]] = field(default_factory=list)

    def busy(self) -> dict[str, float]:
        """Seconds of every resource."""
        found: dict[str, float] = {}
        for name, start, end in self.runs:
            found[name] = found.get(name, 0.0) + end - start
        return found


@dataclass(frozen=True)
class Schedule:
    """flying: windows that are drafted or verified at once; replicas: verifiers; first: seconds in
    which the first state of a window is judged alone while the rest is drafted (inf: never)."""

    draft: float
    verify: float
    k: int
    flying: int = 1
    replicas: int = 1
    first: float = math.inf

    def __post_init__(self) -> None:
        if self.k < 1 or self.flying < 1 or self.replicas < 1:
            raise UserError(
                f"k = {self.k}, flying = {self.flying}, replicas = {self.replicas}: each is at "
                "least 1; a window holds one drafted step or more"
            )
        if not (0 <= self.draft < math.inf and 0 <= self.verify < math.inf and self.first >= 0):
            raise UserError(
                f"seconds of a pass: draft = {self.draft}, verify = {self.verify}, first = "
                f"{self.first}: 0 ≤ seconds must hold"
            )

    @property
    def early(self) -> bool:
        """Whether the first state is judged alone: never where the window would wait for it."""
        return self.first <= self.k * self.draft


def played(plan: Schedule, right_BxN: np.ndarray) -> Timeline:
    """Simulates a batch in step: a window is verified once every request has its drafts, and what
    was drafted ahead counts only where it is right for all. The first state is judged alone only
    for a single request."""
    B, N = right_BxN.shape
    run_BxN, found = _runs(right_BxN), Timeline()
    done_B = np.zeros(B, int)
    while done_B.min() < N:
        start = found.seconds
        if plan.early and B == 1 and not run_BxN[0, done_B[0]]:
            found.runs += [("draft", start, start + plan.first)]
            found.runs += [("verifier 0", start, start + plan.first)]
            found.seconds, found.firsts, done_B = start + plan.first, found.firsts + 1, done_B + 1
            continue
        if plan.early and B == 1:
            found.firsts += 1
            found.runs.append(("verifier 0", start, start + plan.first))
        done_B = _streak(plan, run_BxN, done_B, found)
    return found


def _runs(right_BxN: np.ndarray) -> np.ndarray:
    """Right steps in a row from every step on: int [B, N]."""
    run_BxN = np.zeros(right_BxN.shape, int)
    after_B = np.zeros(len(right_BxN), int)
    for j in reversed(range(right_BxN.shape[1])):
        after_B = run_BxN[:, j] = (after_B + 1) * right_BxN[:, j]
    return run_BxN


def _streak(plan: Schedule, run_BxN: np.ndarray, done_B: np.ndarray, found: Timeline) -> np.ndarray:
    """Windows from verified states on, until one is not wholly right or drafts ahead are of no use.
    Returns the steps that are done."""
    B, N = run_BxN.shape
    start, k = found.seconds, plan.k
    drafting, drafted = start, start + k * plan.draft
    ends: list[float] = []
    free = [start] * plan.replicas
    while True:
        replica = int(np.argmin(free))
        begin = max(drafted, free[replica])
        end = free[replica] = begin + plan.verify
        ends.append(end)
        found.windows += 1
        found.runs += [("draft", drafting, drafted), (f"verifier {replica}", begin, end)]
        live_B = done_B < N
        reach_B = run_BxN[np.arange(B), np.minimum(done_B, N - 1)]
        done_B = np.minimum(done_B + np.where(live_B, np.minimum(reach_B, k) + 1, 0), N)
        open_B = done_B < N
        # The next window is drafted from the draft's own last state; its first step is then drafted
        # too, and has to be the one that the verifier takes.
        waits = [start, *ends][max(len(ends) + 1 - plan.flying, 0)]
        drafting = max(drafted, waits)
        ahead = drafting + (k + 1) * plan.draft if plan.flying > 1 else math.inf
        useful = ahead < end + k * plan.draft and bool((reach_B[open_B] > k).all())
        if not open_B.any() or not useful:
            if plan.flying > 1 and plan.draft and drafting < end:
                found.runs.append(("draft", drafting, min(ahead, end)))
            found.seconds = end
            return done_B
        drafted = ahead


def average(plan: Schedule, a: float, at: Decoding, draws: int = 32) -> float:
    """Mean seconds of a generation, drafted steps being right with probability a."""
    return float(
        np.mean(
            [played(plan, drawn(a, at.steps, at.requests, seed)).seconds for seed in range(draws)]
        )
    )
