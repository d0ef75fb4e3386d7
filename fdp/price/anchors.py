"""A few measured runs correct the cost model: a Gaussian process over what it leaves unexplained,
exact and in numpy.

    log(measured / predicted) = shared + own + noise

`shared` correlates jobs on one cluster, software stack, model, chip and GPU count, and plans near
each other; `own` belongs to one configuration and is heavy-tailed: a broken or stalled run speaks
for itself, not for its neighbours. Prior variances follow the cost model's own uncertainty of each
job. The numbers below were chosen coarsely on collections with whole models and whole clusters held
out, five anchors each; the error is flat around them.

Legend: N jobs, M anchors, U different anchors, F fields, D plan degrees; errors are natural
logarithms."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from fdp.price.hybrid import PricedJobs
from fdp.price.workload import Job

FIELDS = ("cluster", "stack", "model", "chip", "gpus")
# Jobs that agree in all of the fields share a component of this standard deviation, relative to the
# others.
SHARED = {
    ("cluster",): 0.10,
    ("stack",): 0.10,
    ("model",): 0.10,
    ("model", "chip"): 0.12,
    ("model", "chip", "gpus"): 0.06,
}
NEAR = 0.20  # of the squared exponential on the plan, within one model on one chip
LENGTH = 1.5  # log2 steps
DEGREES = ("tp", "pp", "dp", "cp", "ep", "microbatch", "virtual")
FLOOR = 0.2  # least std of `shared`: the cost model is surer of itself than one new model allows
OWN, OWN_SHARE = 0.1, 0.7  # std of `own`: absolute, and at most as a share of the cost model's
FREEDOM, PASSES = 3.0, 5  # of the Student-t of `own`, and how often its variances are re-estimated
NOISE = 0.03  # std of the log of a measurement: the same run twice
MEMORY_STD = 0.1  # of the cost model's log memory


def _fields(job: Job) -> tuple[str, ...]:
    a = job.shape
    # The name alone is not enough: models without one, and variants that a user calls the same.
    model = f"{a.name}|{a.layers}|{a.width}|{a.ffn}|{a.experts}"
    return job.cluster, job.stack, model, job.chip.name, str(job.plan.chips)


def _degrees(jobs: Sequence[Job]) -> np.ndarray:
    return np.log2([[getattr(job.plan, name) for name in DEGREES] for job in jobs]).reshape(
        -1, len(DEGREES)
    )


def correlation(jobs: Sequence[Job], anchors: Sequence[Job]) -> np.ndarray:
    """(N, M) in [0, 1]: correlation of `shared` between jobs and anchors; 1 where fields and
    degrees are equal.
    """
    ours_NxF, theirs_MxF = (
        np.array([_fields(j) for j in js], str).reshape(-1, len(FIELDS)) for js in (jobs, anchors)
    )
    same = {name: ours_NxF[:, None, f] == theirs_MxF[None, :, f] for f, name in enumerate(FIELDS)}
    square_NxM = ((_degrees(jobs)[:, None] - _degrees(anchors)[None]) ** 2).sum(-1)
    total_NxM = NEAR**2 * np.exp(-square_NxM / (2 * LENGTH**2)) * (same["model"] & same["chip"])
    for names, std in SHARED.items():
        total_NxM = total_NxM + std**2 * np.all([same[name] for name in names], 0)
    return total_NxM / (NEAR**2 + sum(std**2 for std in SHARED.values()))


def _averaged(
    anchors: Sequence[Job], std_M: np.ndarray, error_M: np.ndarray
) -> tuple[list[Job], np.ndarray, np.ndarray, np.ndarray]:
    """(configurations, their std, mean error, variance of its noise): one entry for runs of the
    same configuration.
    """
    place = {job: u for u, job in enumerate(dict.fromkeys(anchors))}
    at_M = np.array([place[job] for job in anchors])
    count_U = np.bincount(at_M)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(at_M, values) / count_U

    return list(place), mean(std_M), mean(error_M), NOISE**2 / count_U


def _parts(std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prior std of `shared` and of `own` from the cost model's."""
    own = np.minimum(OWN, OWN_SHARE * std)
    return np.maximum(np.sqrt(std**2 - own**2), FLOOR), own


def _check(**arrays: np.ndarray) -> None:
    for name, value in arrays.items():
        bad = ~(np.isfinite(value) & ((value > 0) | (name == "error_M")))
        if bad.any():
            raise ValueError(
                f"{name}[{bad.argmax()}] = {value[bad.argmax()]}: anchors need finite logs, std > 0"
            )


def posterior(
    jobs: Sequence[Job],
    std_N: np.ndarray,
    anchors: Sequence[Job],
    std_M: np.ndarray,
    error_M: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std (N,) of the log error of `jobs`, given the log errors of the anchors.

    `std_N`, `std_M`: the cost model's std of the log before any measurement; the result exceeds
    `std_N` only where anchors like the job scatter more than that. Exact Gaussian conditioning
    (Rasmussen & Williams 2006, eq. 2.25-2.26), the scale of each anchor's `own` re-estimated from
    its leave-one-out residual (their eq. 5.12) as for a Student-t. Raises ValueError where a number
    is not finite or a std is not positive."""
    std_N, std_M, error_M = (np.asarray(v, float) for v in (std_N, std_M, error_M))
    _check(std_N=std_N, std_M=std_M, error_M=error_M)
    if not len(error_M):
        return np.zeros(len(std_N)), std_N
    known, std_U, error_U, noise_U = _averaged(anchors, std_M, error_M)
    (wide_N, own_N), (wide_U, own_U) = _parts(std_N), _parts(std_U)
    shared_UxU = wide_U[:, None] * wide_U * correlation(known, known)
    tail_U = own_U
    for _ in range(PASSES):
        factor = cho_factor(shared_UxU + np.diag(tail_U**2 + noise_U), lower=True)
        weight_U = cho_solve(factor, error_U)
        left_out_U = weight_U / np.diag(cho_solve(factor, np.eye(len(known))))
        last_U, tail_U = tail_U, np.sqrt((FREEDOM * own_U**2 + left_out_U**2) / (FREEDOM + 1))
    place = {job: u for u, job in enumerate(known)}
    seen_NxU = np.array([place.get(job, -1) for job in jobs], int)[:, None] == np.arange(len(known))
    alike_NxU, seen_N = correlation(jobs, known), seen_NxU.any(1)
    before_N = wide_N**2 + np.where(seen_N, seen_NxU @ last_U**2, own_N**2)
    cross_NxU = wide_N[:, None] * wide_U * alike_NxU + seen_NxU * last_U**2
    after_N = before_N - (cross_NxU * cho_solve(factor, cross_NxU.T).T).sum(1)
    # Anchors that scatter say so of the other configurations like them, anchors that agree as well.
    pooled_N = (FREEDOM * own_N**2 + (left_out_U**2).sum()) / (FREEDOM + len(known))
    after_N = after_N + np.where(seen_N, 0.0, alike_NxU.max(1) * (pooled_N - own_N**2))
    std_now_N = std_N * np.sqrt(np.maximum(after_N, 0.0) / before_N)
    return cross_NxU @ weight_U, np.maximum(std_now_N, np.minimum(std_N, NOISE))


def correct(
    prediction: PricedJobs,
    jobs: Sequence[Job],
    anchors: Sequence[Job],
    at_anchors: PricedJobs,
    time_M: np.ndarray,
    memory_M: np.ndarray | None = None,
    slope: float = 0.0,
) -> PricedJobs:
    """The prediction for `jobs` after runs of `anchors` took `time_M` seconds and `memory_M` bytes
    (NaN: not measured).

    `at_anchors`: the cost model's prediction for them. The interval moves with the time, narrower
    where anchors agree; `feasible` follows the corrected memory with the logistic `slope` of the
    cost model's `fit`. No anchors, no change. Raises ValueError where a measurement is zero,
    negative or infinite."""
    time_M = np.asarray(time_M, float)
    memory_M = np.full(len(time_M), np.nan) if memory_M is None else np.asarray(memory_M, float)
    for name, value in (("time_M", time_M), ("memory_M", memory_M)):
        bad = (value <= 0) | np.isinf(value)
        if bad.any():
            raise ValueError(
                f"{name}[{bad.argmax()}] = {value[bad.argmax()]} is no measurement: give one > 0"
            )
    timed_M, sized_M = np.isfinite(time_M), np.isfinite(memory_M)
    error_M = np.log(time_M[timed_M] / at_anchors.time[timed_M])
    known = [a for a, timed in zip(anchors, timed_M, strict=True) if timed]
    mean_N, std_N = posterior(jobs, prediction.log_std, known, at_anchors.log_std[timed_M], error_M)
    time_N, share_N = prediction.time * np.exp(mean_N), std_N / prediction.log_std
    error_M = np.log(memory_M[sized_M] / at_anchors.memory[sized_M])
    known = [a for a, sized in zip(anchors, sized_M, strict=True) if sized]
    flat = [np.full(n, MEMORY_STD) for n in (len(jobs), len(known))]
    more_N, _ = posterior(jobs, flat[0], known, flat[1], error_M)
    odds_N = prediction.feasible * np.exp(-slope * more_N)
    return dataclasses.replace(
        prediction,
        time=time_N,
        log_std=std_N,
        memory=prediction.memory * np.exp(more_N),
        memory_high=prediction.memory_high * np.exp(more_N),
        low=time_N * (prediction.low / prediction.time) ** share_N,
        high=time_N * (prediction.high / prediction.time) ** share_N,
        feasible=odds_N / (odds_N + 1 - prediction.feasible),
    )
