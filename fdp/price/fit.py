"""Fits the cost model of fdp.price.hybrid to measurements: one program for every hold-out, rows by
weight.

Step time and the stall regime by maximum likelihood (Student-t on the log, so that a few broken
runs do not bend the physics; bounds by construction; Gaussian priors on effects); memory by Huber
loss on its log; the residual by ridge regression on radial basis functions with reweighting, each
ensemble member on its own bootstrap of tasks and centres. Every task weighs as the square root of
its rows, so that no large collection outvotes the rest."""

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from fdp.price import footprint, hybrid, step_time
from fdp.price.hybrid import EFFECTS, MEMORY_EFFECTS, Model
from fdp.price.measurements import MeasuredRun
from fdp.price.workload import Columns, columns

SIGMA, FREEDOM = 0.06, 3.0  # scale of the log error and degrees of freedom of its Student-t
MEMBERS, CENTRES = 8, 128
RIDGE = 5.0
APART = 2.5  # how much further software families are from each other than other features make them
INTERVAL = 0.9


@dataclass(frozen=True)
class FitData:
    """All measurements as arrays (N,), built once; a fit chooses rows by weight."""

    measurements: tuple[MeasuredRun, ...]
    x: Columns
    groups: dict[str, np.ndarray]
    names: dict[str, list[str]]  # members of each group
    index: dict[str, np.ndarray]  # place of each row's member in `names`
    log_time: np.ndarray  # nan: failed or not measured
    log_memory: np.ndarray
    failed: np.ndarray
    weight: np.ndarray

    @property
    def timed(self) -> np.ndarray:
        """(N,) bool: runs with a step time."""
        return np.isfinite(self.log_time) & ~self.failed

    @property
    def tasks(self) -> np.ndarray:
        """(N,) names: configurations that may be ranked against each other share one."""
        return np.array([m.task for m in self.measurements], object)


def gather(measurements: Sequence[MeasuredRun]) -> FitData:
    """Arrays of the measurements. Raises ValueError when there is none with a time."""
    kept = tuple(
        m for m in measurements if m.failed or np.isfinite(m.step_time) or np.isfinite(m.memory)
    )
    if not any(np.isfinite(m.step_time) for m in kept):
        raise ValueError(
            f"nothing to fit: none of {len(measurements)} measurements has a step time"
        )
    x = columns(m.job for m in kept)
    groups = hybrid.groups_of(x)
    names = {g: sorted(set(v)) for g, v in groups.items()}
    index = {g: np.array([names[g].index(v) for v in groups[g]]) for g in names}
    counts = collections.Counter(m.task for m in kept)
    weight = np.array([counts[m.task] ** -0.5 for m in kept])
    with np.errstate(invalid="ignore"):
        log_time = np.log([m.step_time for m in kept])
        log_memory = np.log([m.memory for m in kept])
    failed = np.array([m.failed for m in kept])
    return FitData(
        kept, x, groups, names, index, log_time, log_memory, failed, weight / weight.mean()
    )


def _start(bounds: dict[str, tuple[float, float, float]]) -> np.ndarray:
    fractions = np.array([(start - low) / (high - low) for low, high, start in bounds.values()])
    return np.log(fractions / (1 - fractions))


def _split(
    z: Any, bounds: Any, effects: Any, data: FitData
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Flat vector → (coefficients, {"name|group": values of its members}, the rest)."""
    raw = {name: z[i] for i, name in enumerate(bounds)}
    at, parts = len(bounds), {}
    for name, group in effects:
        n = len(data.names[group])
        parts[f"{name}|{group}"] = z[at : at + n]
        at += n
    return raw, parts, z[at:]


def _shift(parts: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for key, values in parts.items():
        name, _, group = key.partition("|")
        total[name] = total.get(name, 0.0) + values[index[group]]
    return total


def _effects_penalty(parts: dict[str, Any], effects: Any) -> Any:
    return sum(jnp.sum((parts[f"{n}|{g}"] / sd) ** 2) for (n, g), sd in effects.items()) / 2


def _minimise(loss: Any, start: np.ndarray, steps: int, *args: Any) -> np.ndarray:
    def both(z: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(z, *args)
        return float(value), np.asarray(gradient, float)

    return minimize(both, start, jac=True, method="L-BFGS-B", options={"maxiter": steps}).x


class Fitter:
    """Losses over one FitData, compiled once for every choice of rows and every value measured on
    them; `fit` gives a Model from the rows it may see."""

    def __init__(self, data: FitData):
        self.data = data
        inputs = hybrid.numeric(data.x) | {"code": hybrid.family_code(data.groups)}
        self.inputs = {k: jnp.asarray(v) for k, v in inputs.items()}
        self.index = {g: jnp.asarray(v) for g, v in data.index.items()}
        self.stalls = np.isin(data.groups["cluster"].astype(str), hybrid.STALLING) & (
            data.x["pp"] > 1
        )
        self.time_loss = jax.jit(jax.value_and_grad(self._time_loss))
        self.memory_loss = jax.jit(jax.value_and_grad(self._memory_loss))
        self.prior = {"time": _start(step_time.BOUNDS), "memory": _start(footprint.BOUNDS)}

    def _time_loss(self, z: Any, weight: Any, pressure: Any, log_time: Any) -> Any:
        raw, parts, gate = _split(z, step_time.BOUNDS, EFFECTS, self.data)
        k = hybrid.time_coefficients(self.inputs, raw, _shift(parts, self.index))
        terms = step_time.step_time(self.inputs, k)
        y = jnp.where(weight > 0, jnp.nan_to_num(log_time), jnp.log(terms["total"]))

        def likelihood(seconds: Any) -> Any:
            return -(FREEDOM + 1) / 2 * jnp.log1p(((jnp.log(seconds) - y) / SIGMA) ** 2 / FREEDOM)

        odds = hybrid.stall_features(self.inputs, pressure) @ gate
        stalled = jax.nn.log_sigmoid(odds) + likelihood(terms["stalled"])
        usual = jax.nn.log_sigmoid(-odds) + likelihood(terms["total"])
        both = jnp.where(self.stalls, jnp.logaddexp(stalled, usual), likelihood(terms["total"]))
        n = jnp.maximum(jnp.sum(weight > 0), 1)
        spread = jnp.mean((z[: len(step_time.BOUNDS)] - self.prior["time"]) ** 2)
        penalty = (
            0.02 * spread + 1e-4 * jnp.mean(gate**2) + _effects_penalty(parts, EFFECTS) / n / 2
        )
        return -0.05 * jnp.sum(both * weight) / jnp.maximum(jnp.sum(weight), 1e-9) + penalty

    def _memory_loss(self, z: Any, weight: Any, log_memory: Any) -> Any:
        raw, parts, _ = _split(z, footprint.BOUNDS, MEMORY_EFFECTS, self.data)
        shift = _shift(parts, self.index)
        used = {n: raw[n] + shift.get(n, 0.0) for n in footprint.BOUNDS}
        log = jnp.log(footprint.memory(self.inputs, hybrid.bounded(used, footprint.BOUNDS)))
        r = jnp.abs(jnp.where(weight > 0, log - jnp.nan_to_num(log_memory), 0.0))
        huber = jnp.where(r < 0.1, r * r / 0.2, r - 0.05)
        n = jnp.maximum(jnp.sum(weight > 0), 1)
        spread = jnp.mean((z[: len(footprint.BOUNDS)] - self.prior["memory"]) ** 2)
        return (
            jnp.sum(huber * weight) / jnp.maximum(jnp.sum(weight), 1e-9)
            + 0.01 * spread
            + _effects_penalty(parts, MEMORY_EFFECTS) / n / 10
        )

    def _start(self, name: str, effects: Any, more: int) -> np.ndarray:
        return np.concatenate(
            [self.prior[name], np.zeros(sum(len(self.data.names[g]) for _, g in effects) + more)]
        )

    def _named(self, parts: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Effects by member; members that the fit did not move are left out, as they were not
        seen.
        """
        out = {}
        for key, values in parts.items():
            members = self.data.names[key.partition("|")[2]]
            out[key] = {n: float(v) for n, v in zip(members, values, strict=True) if v != 0.0}
        return out

    def analytic(self, keep: np.ndarray, steps: int) -> Model:
        """θ, the regime head and the memory model from the rows in `keep`, without residual."""
        data, x = self.data, self.data.x
        timed = keep & data.timed
        sized = keep & np.isfinite(data.log_memory)
        zm = self._start("memory", MEMORY_EFFECTS, 0)
        zm = _minimise(self.memory_loss, zm, steps, data.weight * sized, data.log_memory)
        memory, memory_parts, _ = _split(zm, footprint.BOUNDS, MEMORY_EFFECTS, data)
        shift = _shift({k: np.asarray(v) for k, v in memory_parts.items()}, data.index)
        used = {n: memory[n] + shift.get(n, 0.0) for n in footprint.BOUNDS}
        log_memory = np.log(
            np.asarray(footprint.memory(self.inputs, hybrid.bounded(used, footprint.BOUNDS)))
        )
        pressure = log_memory - np.log(x["hbm_bytes"])
        width = hybrid.stall_features(self.inputs, jnp.asarray(pressure)).shape[-1]
        z = self._start("time", EFFECTS, width)
        z = _minimise(self.time_loss, z, steps, data.weight * timed, pressure, data.log_time)
        time, parts, gate = _split(z, step_time.BOUNDS, EFFECTS, data)
        return Model(
            {k: float(v) for k, v in time.items()},
            self._named(parts),
            np.asarray(gate),
            {k: float(v) for k, v in memory.items()},
            self._named(memory_parts),
            {},
            {
                "seen": 0.1,
                "unseen": 0.25,
                "experts": 0.2,
                "ensemble": 1.0,
                "quantile": 1.645,
                "memory": 0.2,
            },
            _feasibility(pressure, data, keep),
            {},
        )

    def fit(
        self, keep: np.ndarray, steps: int = 300, seed: int = 0, residual: bool = True
    ) -> Model:
        """A Model from the rows in `keep` (N,) bool."""
        model = self.analytic(keep, steps)
        return self.with_residual(model, keep, seed) if residual else model

    def with_residual(self, model: Model, keep: np.ndarray, seed: int) -> Model:
        """The model with an ensemble of radial-basis networks fitted to what it leaves over."""
        data = self.data
        timed = keep & data.timed
        now = hybrid.predict(model, data.x)
        error_N = (data.log_time - np.log(now.analytic))[timed]
        features_NxK = np.asarray(
            _features(self.inputs, model.time, hybrid.shifts(model.effects, data.groups))
        )[timed]
        # Gross errors belong to the regime head or to a broken run, not to a smooth correction.
        fair = np.abs(error_N) < 0.7
        tasks = data.tasks[timed]
        stretch = np.ones(features_NxK.shape[1])
        stretch[-hybrid.CODE :] = APART
        parts = ensemble(
            features_NxK[fair], error_N[fair], data.weight[timed][fair], tasks[fair], seed, stretch
        )
        return dataclasses.replace(model, residual=parts)


@jax.jit
def _features(inputs: Any, time: Any, shift: Any) -> Any:
    k = hybrid.time_coefficients(inputs, time, shift)
    return hybrid.residual_features(inputs, step_time.step_time(inputs, k), shift["launch_rank"])


def ensemble(
    features_NxK: np.ndarray,
    error_N: np.ndarray,
    weight_N: np.ndarray,
    tasks_N: np.ndarray,
    seed: int,
    stretch_K: np.ndarray | float = 1.0,
    ridge: float = RIDGE,
) -> dict[str, np.ndarray]:
    """Ridge regression on radial basis functions; a member sees each task a Poisson(1) number of
    times.
    """
    rng = np.random.default_rng(seed)
    mean, scale = features_NxK.mean(0), np.maximum(features_NxK.std(0), 0.1) / stretch_K
    names, inverse = np.unique(tasks_N.astype(str), return_inverse=True)
    centres, weights = [], []
    for _ in range(MEMBERS):
        count_N = rng.poisson(1.0, len(names))[inverse]
        chance = weight_N * (count_N > 0)
        picked = rng.choice(
            len(error_N),
            min(CENTRES, int((chance > 0).sum())),
            replace=False,
            p=chance / chance.sum(),
        )
        one = (features_NxK[picked] - mean) / scale
        phi_NxM = hybrid.radial((features_NxK - mean) / scale, one)
        w_N, value_M = weight_N * count_N, np.zeros(len(picked))
        for _ in range(3):  # reweighted as the Student-t asks
            robust_N = w_N / (1 + ((error_N - phi_NxM @ value_M) / SIGMA) ** 2 / FREEDOM)
            gram = (phi_NxM * robust_N[:, None]).T @ phi_NxM + ridge * np.eye(len(picked))
            value_M = np.linalg.solve(gram, phi_NxM.T @ (robust_N * error_N))
        centres.append(one)
        weights.append(value_M)
    # Every member has as many centres, spare ones without weight, so that all fits share one
    # compiled predictor.
    spare = [CENTRES - len(c) for c in centres]
    return {
        "mean": mean,
        "scale": scale,
        "centres": np.stack(
            [np.pad(c, ((0, n), (0, 0))) for c, n in zip(centres, spare, strict=True)]
        ),
        "weights": np.stack([np.pad(w, (0, n)) for w, n in zip(weights, spare, strict=True)]),
    }


def weighted_quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The least value below or at which `share` of the weight lies."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) >= share * weights.sum() * (1 - 1e-12)
    return float(values[order][int(np.argmax(reached))])


def _feasibility(pressure: np.ndarray, data: FitData, keep: np.ndarray) -> dict[str, float]:
    """The log(memory/HBM) that tells failed runs from others best: most recall less false alarms
    (Youden 1950).

    Only clusters that report failures are asked. Some runs failed for other reasons than memory:
    they cannot be told."""
    reporting = np.isin(
        data.groups["cluster"], np.unique(data.groups["cluster"][data.failed & keep])
    )
    ran, failed = keep & reporting & np.isfinite(data.log_memory), keep & data.failed
    if not failed.any() or not ran.any():
        return {"margin": -0.1, "slope": 12.0}
    limits = np.linspace(-1.0, 0.5, 151)
    gain = [(pressure[failed] > limit).mean() - (pressure[ran] > limit).mean() for limit in limits]
    return {"margin": float(limits[int(np.argmax(gain))]), "slope": 12.0}
