"""Search for the fastest plan where every evaluation is a real run: algorithms, the driver that
counts, metrics.

A plan names the degrees and sizes of one run, such as {"tp": 2, "pp": 1, "dp": 32, "mbs": 2,
"zero": 1}. Plans that are structurally invalid are no part of a landscape; a plan that runs out of
memory is, and trying it is an evaluation.

An algorithm is a generator function of (plans, rng, prior). It yields the index of the plan to run
next and receives the measured step time in s, inf if the run failed; it sees nothing else of the
landscape. When it returns, it stops.

    trace = run(landscape, bayes, seed=0, prior=prior)
    evaluations_to(trace.order, landscape, within=0.05)

Legend: N plans of a landscape, M plans measured so far, K coordinates of a plan, E evaluations."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import product

import cmaes
import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import ndtr

Point = Mapping[str, int]  # a plan
Proposals = Generator[int, float, None]

NODE = 8  # accelerators that share one scale-up domain: where tensor parallelism is cheap
# What a larger value does to the memory of a device: +1 saves, -1 costs. dp follows from the others
# and the cluster.
RELIEF = {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "zero": 1, "mbs": -1, "vp": -1}
# log seconds that stand for a failed run where only ranks matter: slower than any real step
FAILED = 50.0
POPULATION, SAMPLE = 10, 3  # of regularised evolution


@dataclass(frozen=True)
class Landscape:
    """Measured step times of every plan of one task (model, cluster, global batch).

    plans: distinct, all with the same keys; zero (a stage, 0 to 3) is an integer >= 0, everything
    else >= 1. time_N: seconds > 0, inf where the run failed. Raises ValueError for anything else,
    or if no plan is feasible."""

    name: str
    plans: tuple[Point, ...]
    time_N: np.ndarray

    def __post_init__(self) -> None:
        plans, count = self.plans, len(self.plans)
        if not plans:
            raise ValueError(f"landscape {self.name!r} is empty: give at least one plan")
        if np.shape(self.time_N) != (count,):
            shape = np.shape(self.time_N)
            raise ValueError(f"{self.name!r}: time_N has shape {shape}, plans are {count}")
        seen: dict[tuple[tuple[str, int], ...], int] = {}
        for i, (plan, time) in enumerate(zip(plans, self.time_N, strict=True)):
            wrong = {k: v for k, v in plan.items() if v != int(v) or v < (k != "zero")}
            first = seen.setdefault(tuple(sorted(plan.items())), i)
            problem = (
                f"plan {i} has keys {sorted(plan)}, plan 0 {sorted(plans[0])}"
                if plan.keys() != plans[0].keys()
                else f"plan {i} has {wrong}: degrees are integers >= 1, zero >= 0"
                if wrong
                else f"plans {first} and {i} are both {dict(plan)}: keep one of them"
                if first != i
                else f"time_N[{i}] = {time} s: give seconds > 0, or inf for a failed run"
                if not time > 0  # catches NaN
                else ""
            )
            if problem:
                raise ValueError(f"{self.name!r}: {problem}")
        if not np.isfinite(self.time_N).any():
            raise ValueError(f"{self.name!r}: no feasible plan, all {count} runs failed")

    @property
    def best(self) -> float:
        """Seconds of the best measured step."""
        return float(np.min(self.time_N))


@dataclass(frozen=True)
class Prior:
    """What a cost model says of N plans before any run.

    log_time_N: log seconds. std_N: standard deviation of log_time_N. feasible_N: probability that
    the run succeeds. Raises ValueError unless all are finite and of one length, std > 0 and
    probabilities in [0, 1]."""

    log_time_N: np.ndarray
    std_N: np.ndarray
    feasible_N: np.ndarray

    def __post_init__(self) -> None:
        names = ("log_time_N", "std_N", "feasible_N")
        log_N, std_N, p_N = values = [np.asarray(getattr(self, name)) for name in names]
        shapes = {v.shape for v in values}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"{', '.join(names)} must be vectors of one length, got {shapes}")
        rules = ("finite", "finite and > 0", "in [0, 1]")
        holds = (np.isfinite(log_N), np.isfinite(std_N) & (std_N > 0), (p_N >= 0) & (p_N <= 1))
        for name, value_N, rule, holds_N in zip(names, values, rules, holds, strict=True):
            if not holds_N.all():
                i = int(np.argmin(holds_N))
                raise ValueError(f"prior {name}, {rule}: {name}[{i}] = {value_N[i]}")


Algorithm = Callable[[Sequence[Point], np.random.Generator, Prior | None], Proposals]


@dataclass(frozen=True)
class Trace:
    """One search: indices of the plans measured, in order, each once, and the regret after each
    evaluation."""

    order: tuple[int, ...]
    regret_E: np.ndarray


def run(
    landscape: Landscape,
    algorithm: Algorithm,
    seed: int,
    prior: Prior | None = None,
    within: float | None = None,
) -> Trace:
    """Let `algorithm` search until it stops, all plans are measured, or it is stuck.

    With `within`, the referee, who knows the landscape, also ends it at a plan that close to the
    best: what follows would change no metric.

    A plan that is proposed again is answered from memory at no cost; an algorithm that proposes
    nothing new 100 + N times in a row is stuck. Raises ValueError for a prior of another
    length or a proposal outside."""
    count = len(landscape.plans)
    if prior is not None and len(prior.log_time_N) != count:
        raise ValueError(
            f"the prior has {len(prior.log_time_N)} plans, landscape {landscape.name!r} has {count}"
        )
    enough = 0.0 if within is None else (1 + within) * landscape.best
    order: dict[int, None] = {}
    repeats = 0
    proposals = algorithm(landscape.plans, np.random.default_rng(seed), prior)
    with suppress(StopIteration), closing(proposals):
        index = int(next(proposals))
        while repeats <= 100 + count:
            if not 0 <= index < count:
                raise ValueError(f"{algorithm.__name__} proposed plan {index} of 0..{count - 1}")
            repeats = repeats + 1 if index in order else 0
            order[index] = None
            if len(order) == count or landscape.time_N[index] <= enough:
                break
            index = int(proposals.send(float(landscape.time_N[index])))
    return Trace(tuple(order), regret_curve(tuple(order), landscape))


# Metrics
# -------------------------------------------------------------------------------------------------


def regret_curve(order: Sequence[int], landscape: Landscape) -> np.ndarray:
    """[E] best time so far / best time of the landscape - 1 after each evaluation; inf until one
    succeeds."""
    time_E = np.asarray(landscape.time_N, float)[list(order)]
    return np.minimum.accumulate(time_E) / landscape.best - 1


def evaluations_to(order: Sequence[int], landscape: Landscape, within: float) -> float:
    """Evaluations, failed ones included, until a plan of at most (1 + within) x best was measured;
    inf if none was."""
    close_N = np.asarray(landscape.time_N, float) <= (1 + within) * landscape.best
    hits = np.flatnonzero(close_N[list(order)])
    return float(hits[0] + 1) if len(hits) else np.inf


# The grid of plans
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanGrid:
    """Plans as points: log2 of the degrees and the ZeRO stage as it is."""

    keys: tuple[str, ...]
    log2_NxK: np.ndarray
    level_NxK: np.ndarray  # place of the value among those of its key: neighbours differ by 1

    @classmethod
    def of(cls, plans: Sequence[Point]) -> "PlanGrid":
        """Keys that never change are left out, and dp where it follows from the others, as on a
        fixed cluster."""
        keys = tuple(k for k in plans[0] if len({p[k] for p in plans}) > 1)
        others = tuple(k for k in keys if k != "dp")
        if len({tuple(p[k] for k in others) for p in plans}) == len(plans):
            keys = others
        value_NxK = np.array([[p[k] for k in keys] for p in plans], float).reshape(
            len(plans), len(keys)
        )
        level_NxK = np.zeros(value_NxK.shape, int)
        for k in range(len(keys)):
            level_NxK[:, k] = np.unique(value_NxK[:, k], return_inverse=True)[1]
        zero_K = np.array([k == "zero" for k in keys], bool)
        log2_NxK = np.where(zero_K, value_NxK, np.log2(np.maximum(value_NxK, 1)))
        return cls(keys, log2_NxK, level_NxK)

    def nearest(self, level_K: np.ndarray, free_N: np.ndarray) -> int:
        """The free plan fewest level steps away from a point; the first of equals."""
        return int(np.argmin(np.where(free_N, np.abs(self.level_NxK - level_K).sum(1), np.inf)))

    def neighbours(self, index: int, free_N: np.ndarray) -> np.ndarray:
        """Free plans fewest level steps away from plan `index`: one step, where any is left
        there."""
        steps_N = np.abs(self.level_NxK - self.level_NxK[index]).sum(1)
        return np.flatnonzero(free_N & (steps_N == steps_N[free_N].min()))


def relief(plans: Sequence[Point]) -> np.ndarray:
    """[N, K] memory-relevant coordinates, log2 (ZeRO as it is): a plan that is larger in all of
    them needs no more."""
    grid = PlanGrid.of(plans)
    used = [k for k, key in enumerate(grid.keys) if key in RELIEF]
    return grid.log2_NxK[:, used] * np.array([RELIEF[grid.keys[k]] for k in used], float)


# Algorithms
# -------------------------------------------------------------------------------------------------


def random(plans: Sequence[Point], rng: np.random.Generator, prior: Prior | None) -> Proposals:
    """Uniform without repetition."""
    for index in rng.permutation(len(plans)):
        yield int(index)


def expert(plans: Sequence[Point], rng: np.random.Generator, prior: Prior | None) -> Proposals:
    """The rules of an experienced Megatron user (Narayanan et al. 2021, arXiv:2104.04473, takeaways
    1 to 3).

    Plans in this order: predicted to fit (prior, probability >= 0.5; all, without one); tp inside a
    node; smallest tp·pp·cp; smallest pp (at equal size, tensor before pipeline); largest
    microbatch; lowest ZeRO stage; fewest virtual stages; then as given. Until a run succeeds, take
    the next of this order that does not need at least the memory of a failed run in every respect.
    Then climb: the unmeasured neighbours (fewest steps on the grid, first of the order) of the
    fastest plan so far. Plans known not to fit come last. Deterministic."""
    grid, relief_NxK = PlanGrid.of(plans), relief(plans)
    fits_N = np.ones(len(plans), bool) if prior is None else np.asarray(prior.feasible_N) >= 0.5

    def preference(i: int) -> tuple[int, ...]:
        tp, pp, cp, mbs, zero, vp = (
            plans[i].get(k, k != "zero") for k in ("tp", "pp", "cp", "mbs", "zero", "vp")
        )
        return (not fits_N[i], tp > NODE, tp * pp * cp, pp, -mbs, zero, vp, i)

    rank_N = np.empty(len(plans), int)
    rank_N[sorted(range(len(plans)), key=preference)] = np.arange(len(plans))
    free_N, hopeless_N = np.ones(len(plans), bool), np.zeros(len(plans), bool)
    best, best_time = -1, np.inf
    while free_N.any():
        choice_N = free_N & ~hopeless_N if (free_N & ~hopeless_N).any() else free_N
        candidates = np.flatnonzero(choice_N) if best < 0 else grid.neighbours(best, choice_N)
        index = int(candidates[np.argmin(rank_N[candidates])])
        time = yield index
        free_N[index] = False
        if not np.isfinite(time):
            hopeless_N |= (relief_NxK <= relief_NxK[index]).all(1)
        elif time < best_time:
            best, best_time = index, time


def tpe(plans: Sequence[Point], rng: np.random.Generator, prior: Prior | None) -> Proposals:
    """Tree-structured Parzen estimator (Bergstra et al. 2011; optuna's multivariate TPESampler) on
    grid levels.

    A suggestion that is off the landscape or measured already is drawn again, and after eight draws
    moved to the nearest unmeasured plan; the sampler is told the plan that ran. Failed runs are
    told as slower than all others."""
    import optuna  # takes a second

    sampler = optuna.samplers.TPESampler(seed=int(rng.integers(2**31)), multivariate=True)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler)  # announces itself
    optuna.logging.set_verbosity(verbosity)
    grid = PlanGrid.of(plans)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        key: optuna.distributions.IntDistribution(0, int(grid.level_NxK[:, k].max()))
        for k, key in enumerate(grid.keys)
    }
    free_N = np.ones(len(plans), bool)
    plan_at = {tuple(level_K): i for i, level_K in enumerate(grid.level_NxK.tolist())}
    while free_N.any():
        for _ in range(8):
            trial = study.ask(space)
            # Ignored by the sampler, which is told what ran.
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            level_K = [trial.params[key] for key in grid.keys]
            index = plan_at.get(tuple(level_K), -1)
            if index >= 0 and free_N[index]:
                break
        else:
            index = grid.nearest(np.array(level_K), free_N)
        time = yield index
        free_N[index] = False
        params = dict(zip(grid.keys, grid.level_NxK[index].tolist(), strict=True))
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, value=_log(time))
        )


def cma_es(plans: Sequence[Point], rng: np.random.Generator, prior: Prior | None) -> Proposals:
    """CMA-ES (Hansen 2016, arXiv:1604.00772; package cmaes) in log2 coordinates scaled to [-1, 1].

    A sample stands for the nearest plan; where that was measured before, the driver answers from
    memory. A generation with nothing new ends in a restart around a random unmeasured plan. (Moving
    every sample to an unmeasured plan tells the optimizer lies: worse than random on the playbook.)
    Failed runs rank last."""
    grid = PlanGrid.of(plans)
    low_K, high_K = grid.log2_NxK.min(0), grid.log2_NxK.max(0)
    idle = max(0, 2 - len(grid.keys))  # cmaes asks for two coordinates
    unit_NxK = np.pad((grid.log2_NxK - low_K) / (high_K - low_K) * 2 - 1, ((0, 0), (0, idle)))
    bounds_Kx2 = np.tile([-1.0, 1.0], (unit_NxK.shape[1], 1))
    free_N = np.ones(len(plans), bool)
    while free_N.any():
        index = int(rng.choice(np.flatnonzero(free_N)))
        yield index
        free_N[index] = False
        seed = int(rng.integers(2**31))
        optimizer = cmaes.CMA(mean=unit_NxK[index], sigma=0.3, bounds=bounds_Kx2, seed=seed)
        news = True
        while news and free_N.any():
            news, generation = False, []
            for _ in range(optimizer.population_size):
                x_K = optimizer.ask()
                index = int(np.argmin(np.abs(unit_NxK - x_K).sum(1)))
                time = yield index
                generation.append((x_K, _log(time)))
                news |= bool(free_N[index])
                free_N[index] = False
            optimizer.tell(generation)


def evolution(plans: Sequence[Point], rng: np.random.Generator, prior: Prior | None) -> Proposals:
    """Regularised evolution (Real et al. 2019, arXiv:1802.01548, algorithm 1): the oldest dies, not
    the worst.

    A mutation is a random unmeasured neighbour on the grid of the best of SAMPLE random members.
    """
    grid = PlanGrid.of(plans)
    free_N = np.ones(len(plans), bool)
    members: list[tuple[float, int]] = []  # oldest first
    while free_N.any():
        if len(members) < POPULATION:
            candidates = np.flatnonzero(free_N)
        else:
            drawn = rng.choice(len(members), min(SAMPLE, len(members)), replace=False)
            candidates = grid.neighbours(min(members[i] for i in drawn)[1], free_N)
        index = int(rng.choice(candidates))
        time = yield index
        free_N[index] = False
        members = [*members, (_log(time), index)][-POPULATION:]


def bayes(plans: Sequence[Point], rng: np.random.Generator, prior: Prior | None) -> Proposals:
    """Bayesian optimisation with a cost model as prior: expected improvement x P(feasible) (Gardner
    et al. 2014).

    Log time is a Gaussian process with the prior's mean and std (see `posterior`); P(feasible) is
    `feasibility`. Plans with P < POSSIBLE wait until no other is left: a plan that cannot run may
    look so fast that the product favours it. Before any run has succeeded there is no incumbent:
    the plan with the least posterior mean among those with P >= 0.5. Equals are decided by rng.
    Raises ValueError without a prior."""
    if prior is None:
        raise ValueError("bayes needs a prior: give run(..., prior=...), or use bayes_flat")
    yield from _bayes(plans, rng, prior, flat=False)


def bayes_flat(plans: Sequence[Point], rng: np.random.Generator, prior: Prior | None) -> Proposals:
    """`bayes` that knows nothing beforehand: constant mean, unit std, P(feasible) = 0.5. The
    ablation of the prior."""
    flat_N = np.ones(len(plans))
    yield from _bayes(plans, rng, Prior(0 * flat_N, flat_N, 0.5 * flat_N), flat=True)


def _bayes(plans: Sequence[Point], rng: np.random.Generator, prior: Prior, flat: bool) -> Proposals:
    log2_NxK, relief_NxK = PlanGrid.of(plans).log2_NxK, relief(plans)
    free_N = np.ones(len(plans), bool)
    measured: list[int] = []
    logs: list[float] = []
    while free_N.any():
        log_M = np.array(logs)
        ok_M = log_M < FAILED
        done = np.array(measured, int)
        # Without a cost model the level of the times is unknown too: their mean stands for it.
        level = float(log_M[ok_M].mean()) if flat and ok_M.any() else 0.0
        mean_N, std_N = posterior(
            log2_NxK, prior.log_time_N + level, prior.std_N, done[ok_M], log_M[ok_M]
        )
        p_N = feasibility(relief_NxK, np.asarray(prior.feasible_N), done, ok_M)
        likely_N = free_N & (p_N >= (POSSIBLE if ok_M.any() else 0.5))
        if not likely_N.any():
            likely_N, score_N = free_N, p_N
        elif ok_M.any():
            score_N = _log_expected_improvement(mean_N, std_N, log_M.min()) + np.log(
                np.maximum(p_N, POSSIBLE)
            )
        else:
            score_N = -mean_N
        index = int(rng.choice(np.flatnonzero(likely_N & (score_N == score_N[likely_N].max()))))
        time = yield index
        free_N[index] = False
        measured.append(index)
        logs.append(_log(time))


def _log(time: float) -> float:
    return float(np.log(time)) if np.isfinite(time) else FAILED


# The surrogate of bayes
# -----------------------------------------------------------------------------------------------

NOISE = 0.01  # std of log time from run to run
# share of the prior variance that all plans have in common: a cost model is off by a factor first
# of all
SHARED = 0.3
LENGTHS = (1.0, 2.0, 4.0, 8.0)  # in log2 steps
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the prior's std
POSSIBLE = 0.2  # least P(feasible) worth a run while likelier plans are left
PSEUDO = 1.0  # weight of the prior probability, in observations
REACH = 1.0  # log2 steps over which an observed failure or success speaks for others


def posterior(
    log2_NxK: np.ndarray,
    mean_N: np.ndarray,
    std_N: np.ndarray,
    index_M: np.ndarray,
    log_M: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std [N] of log time given M measurements: a Gaussian process whose prior is mean_N ±
    std_N.

    cov(i, j) = (a std_i)(a std_j) [c + (1 - c) Matérn-5/2(|log2_i - log2_j| / l)], c = SHARED.
    Scale a and length l maximise the marginal likelihood (Rasmussen & Williams 2006, eq. 2.30) on a
    small grid, with a log-normal prior that keeps a = 1, l = 2 while measurements are few. Without
    any: the prior."""
    mean_N, std_N = np.asarray(mean_N, float), np.asarray(std_N, float)
    if not len(index_M):
        return mean_N, std_N
    distance_NxM = np.sqrt(((log2_NxK[:, None] - log2_NxK[None, index_M]) ** 2).sum(-1))
    error_M = log_M - mean_N[index_M]

    def covariance(rows: np.ndarray | slice, scale: float, length: float) -> np.ndarray:
        r = np.sqrt(5) * distance_NxM[rows] / length
        matern = (1 + r + r**2 / 3) * np.exp(-r)
        return scale**2 * std_N[rows, None] * std_N[index_M] * (SHARED + (1 - SHARED) * matern)

    def solve(scale: float, length: float) -> tuple[float, tuple, np.ndarray]:
        factor = cho_factor(
            covariance(index_M, scale, length) + NOISE**2 * np.eye(len(index_M)), lower=True
        )
        weight_M = cho_solve(factor, error_M)
        evidence = -0.5 * error_M @ weight_M - np.log(np.diag(factor[0])).sum()
        return evidence - 0.5 * (np.log(scale) ** 2 + np.log(length / 2) ** 2), factor, weight_M

    scale, length = max(product(SCALES, LENGTHS), key=lambda s_l: solve(*s_l)[0])
    _, factor, weight_M = solve(scale, length)
    cross_NxM = covariance(slice(None), scale, length)
    variance_N = (scale * std_N) ** 2 - (cross_NxM * cho_solve(factor, cross_NxM.T).T).sum(1)
    return mean_N + cross_NxM @ weight_M, np.sqrt(np.maximum(variance_N, 1e-12))


def feasibility(
    relief_NxK: np.ndarray, prior_N: np.ndarray, index_M: np.ndarray, ok_M: np.ndarray
) -> np.ndarray:
    """[N] probability that a run does not fail: the prior's, corrected by a one-sided kernel
    smoother of its surprises.

    P = p0 + Σ_i k_i (ok_i - p0_i) / (w + Σ_i k_i), w = PSEUDO, k = exp(-(d / REACH)² / 2): what was
    expected changes nothing elsewhere. The distance d counts only coordinates in which the
    observation says nothing by itself: a failure speaks at full weight for all plans that save
    memory in no coordinate more than the failed one, a success for all that save no less than the
    successful one."""
    ahead_NxMxK = relief_NxK[:, None] - relief_NxK[None, index_M]
    unknown_NxMxK = np.maximum(np.where(ok_M[:, None], -ahead_NxMxK, ahead_NxMxK), 0)
    k_NxM = np.exp(-0.5 * (unknown_NxMxK**2).sum(-1) / REACH**2)
    surprise_M = ok_M - prior_N[index_M]
    return np.clip(prior_N + k_NxM @ surprise_M / (PSEUDO + k_NxM.sum(1)), 0, 1)


def _log_expected_improvement(
    mean_N: np.ndarray, std_N: np.ndarray, incumbent: float
) -> np.ndarray:
    """log E[max(incumbent - y, 0)], y ~ N(mean, std²); in logs, for far from the incumbent it
    underflows."""
    z_N = (incumbent - mean_N) / std_N
    near_N = np.maximum(z_N, -5.0)
    density_N = np.exp(-0.5 * near_N**2) / np.sqrt(2 * np.pi)
    log_near_N = np.log(density_N + near_N * ndtr(near_N))
    # φ(z) + z Φ(z) -> φ(z) / z² as z -> -inf (Ament et al. 2023, arXiv:2310.20708)
    tail_N = -0.5 * (z_N**2 - near_N**2) - 2 * np.log(np.minimum(z_N, -5.0) / -5.0)
    return np.log(std_N) + log_near_N + tail_N
