"""Uneven pipelines: split an ordered list of layers into stages, exactly, by dynamic programming
and by an ILP.

The problem is the inter-operator pass of Alpa (Zheng et al. 2022, arXiv:2201.12023, eq. 2): with m
microbatches, stage times T_1..T_p and every device in one stage,

    minimise  T_1 + ... + T_p + (m - 1) max_s T_s,
              T_s = Σ layers of s + cost of the cut after s,

over contiguous non-empty stages and, per stage, one of C sub-meshes with its own layer times. The
stage number p is given. Count the embedding and the logits as layers.

Legend: L layers, S stages, C sub-meshes (candidate sizes), D devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

TOLERANCE = 1e-9  # relative: sums of the same floats in another order are equal


@dataclass(frozen=True)
class Partition:
    """A pipeline of S stages. Stage s holds layers starts[s]..starts[s + 1] - 1 on sub-mesh
    meshes[s].
    """

    starts: tuple[int, ...]  # S + 1 values, 0 first, L last
    meshes: tuple[int, ...]  # index of the sub-mesh of each stage
    stage_times: tuple[float, ...]  # seconds a microbatch, with the cut that follows
    time: float  # seconds a step, eq. 2


def pipeline_time(stage_times: Sequence[float], microbatches: int) -> float:
    """Σ T_s + (m - 1) max T_s: the last of m microbatches leaves a pipeline of stages T_s (Alpa,
    eq. 2).
    """
    return float(sum(stage_times) + (microbatches - 1) * max(stage_times))


@dataclass(frozen=True)
class _Problem:
    time_CxL: np.ndarray
    cut_L: np.ndarray  # after each layer; 0 after the last
    memory_SxCxL: np.ndarray
    limit_S: np.ndarray
    size_C: np.ndarray
    devices: int
    microbatches: int

    @property
    def stages(self) -> int:
        return len(self.limit_S)

    @property
    def layers(self) -> int:
        return len(self.cut_L)


def partition_dp(
    layer_times: np.ndarray,
    stages: int,
    microbatches: int,
    *,
    cut_times: np.ndarray | None = None,
    layer_memory: np.ndarray | None = None,
    memory_limits: np.ndarray | float | None = None,
    mesh_sizes: Sequence[int] | None = None,
    devices: int | None = None,
) -> Partition:
    """The optimal pipeline, by Alpa's dynamic program: enumerate t_max, minimise Σ T_s under T_s <=
    t_max.

    layer_times [L] or [C, L]: seconds of a layer a microbatch, forward and backward, per sub-mesh.
    cut_times [L - 1]: seconds to send across the cut after a layer, paid by the sending stage.
    layer_memory: bytes of a layer on a device, of a shape that broadcasts to [S, C, L] (activations
    in flight depend on the stage). memory_limits [S] or one number: bytes a device of the stage may
    hold. mesh_sizes [C]: devices of each sub-mesh, of `devices` in all, every one of which is used
    (without them: one device a stage).

    Every distinct stage time is a candidate of t_max, so the result is exact; candidates run
    upwards from the smallest feasible one and stop when (m - 1) t_max plus the least possible sum
    cannot win: O(S C D L²) for each of them. Raises ValueError for bad input, and where no
    partition exists, saying which constraint binds."""
    problem = _problem(
        layer_times,
        stages,
        microbatches,
        cut_times,
        layer_memory,
        memory_limits,
        mesh_sizes,
        devices,
    )
    time_CxIxJ, fits_SxCxIxJ = _interval_times(problem), _interval_fits(problem)
    cost_SxCxIxJ = np.where(fits_SxCxIxJ, time_CxIxJ, np.inf)
    least_sum = _least_sum(cost_SxCxIxJ, problem)
    if not np.isfinite(least_sum[0]):
        raise ValueError(_what_binds(problem))
    candidates = np.unique(cost_SxCxIxJ[np.isfinite(cost_SxCxIxJ)])
    low, high = 0, len(candidates) - 1  # the largest is feasible
    while low < high:
        middle = (low + high) // 2
        feasible = np.isfinite(_least_sum(_capped(cost_SxCxIxJ, candidates[middle]), problem)[0])
        low, high = (low, middle) if feasible else (middle + 1, high)
    best: Partition | None = None
    for t_max in candidates[low:]:
        if best is not None and least_sum[0] + (microbatches - 1) * t_max >= best.time:
            break
        _, starts, meshes = _least_sum(_capped(cost_SxCxIxJ, t_max), problem)
        found = _priced(problem, starts, meshes)
        best = found if best is None or found.time < best.time else best
    assert best is not None
    return best


def partition_ilp(
    layer_times: np.ndarray,
    stages: int,
    microbatches: int,
    *,
    cut_times: np.ndarray | None = None,
    layer_memory: np.ndarray | None = None,
    memory_limits: np.ndarray | float | None = None,
    mesh_sizes: Sequence[int] | None = None,
    devices: int | None = None,
    time_limit_s: float = 60.0,
) -> Partition:
    """The same problem and arguments as `partition_dp`, as an integer linear program for HiGHS
    (scipy.optimize.milp).

    Binary z[s, l]: layer l lies in stage s or before it, decreasing in l and increasing in s;
    binary u[s, c]: stage s runs on sub-mesh c; y[s, c, l] >= 0: layer l is in stage s on c, with
    Σ_c y = z[s] - z[s - 1] and y <= u; t >= T_s. The cut after stage s costs Σ_l cut[l] (z[s, l] -
    z[s, l + 1]). Objective Σ T_s + (m - 1) t.

    Raises ValueError as `partition_dp` does, and TimeoutError if no proven optimum is found in
    time_limit_s seconds."""
    problem = _problem(
        layer_times,
        stages,
        microbatches,
        cut_times,
        layer_memory,
        memory_limits,
        mesh_sizes,
        devices,
    )
    cost, constraints, integrality, upper = _program(problem)
    result = milp(
        cost,
        constraints=constraints,
        integrality=integrality,
        bounds=Bounds(np.zeros_like(cost), upper),
        options={"time_limit": time_limit_s, "mip_rel_gap": TOLERANCE},
    )
    if result.status == 2:
        raise ValueError(_what_binds(problem))
    if result.status != 0:
        raise TimeoutError(
            f"HiGHS found no proven optimum in time_limit_s = {time_limit_s}: {result.message}"
        )
    z_SxL = result.x[: stages * problem.layers].reshape(stages, problem.layers)
    u_SxC = result.x[z_SxL.size :][: stages * len(problem.size_C)].reshape(stages, -1)
    return _priced(problem, [0, *np.rint(z_SxL.sum(1)).astype(int)], u_SxC.argmax(1))


def _problem(
    layer_times: np.ndarray,
    stages: int,
    microbatches: int,
    cut_times: np.ndarray | None,
    layer_memory: np.ndarray | None,
    memory_limits: np.ndarray | float | None,
    mesh_sizes: Sequence[int] | None,
    devices: int | None,
) -> _Problem:
    time_CxL = np.atleast_2d(np.asarray(layer_times, float))
    if time_CxL.ndim != 2 or not time_CxL.size:
        raise ValueError(
            f"layer_times has shape {np.shape(layer_times)}: give [L] or [C, L], not empty"
        )
    (meshes, layers), cuts = time_CxL.shape, 0.0 if cut_times is None else cut_times
    if stages < 1 or microbatches < 1:
        raise ValueError(
            f"stages = {stages}, microbatches = {microbatches}: both must be at least 1"
        )
    if stages > layers:
        raise ValueError(
            f"stages = {stages} > layers = {layers}: every stage needs a layer; use at most "
            f"{layers} stages"
        )
    if (layer_memory is None) != (memory_limits is None):
        raise ValueError("layer_memory and memory_limits belong together: give both or neither")
    if (mesh_sizes is None) != (devices is None):
        raise ValueError("mesh_sizes and devices belong together: give both or neither")
    cut_L = np.append(_broadcast("cut_times", cuts, (layers - 1,)), 0.0)
    memory_SxCxL = _broadcast(
        "layer_memory", 0.0 if layer_memory is None else layer_memory, (stages, meshes, layers)
    )
    limit_S = _broadcast(
        "memory_limits", 0.0 if memory_limits is None else memory_limits, (stages,)
    )
    size_C = np.asarray([1] * meshes if mesh_sizes is None else mesh_sizes)
    if size_C.shape != (meshes,) or (size_C < 1).any() or (size_C != size_C.astype(int)).any():
        raise ValueError(
            f"mesh_sizes = {size_C.tolist()}: give one integer >= 1 for each of {meshes} rows of "
            "layer_times"
        )
    for name, values in (
        ("layer_times", time_CxL),
        ("cut_times", cut_L),
        ("layer_memory", memory_SxCxL),
    ):
        if not (np.isfinite(values) & (values >= 0)).all():
            at = tuple(int(i) for i in np.argwhere(~(np.isfinite(values) & (values >= 0)))[0])
            raise ValueError(f"{name} at {at} = {values[at]}: give finite values >= 0")
    if not (limit_S >= 0).all():
        raise ValueError(f"memory_limits = {limit_S.tolist()}: give bytes >= 0")
    total = stages if devices is None else devices
    return _Problem(time_CxL, cut_L, memory_SxCxL, limit_S, size_C.astype(int), total, microbatches)


def _broadcast(name: str, values: np.ndarray | float, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(np.asarray(values, float), shape)
    except ValueError as error:
        raise ValueError(
            f"{name} has shape {np.shape(values)}: it must broadcast to {shape}"
        ) from error


def _priced(problem: _Problem, starts: Sequence[int], meshes: Sequence[int]) -> Partition:
    bounds = tuple(int(i) for i in starts)
    times = tuple(
        float(problem.time_CxL[c, i:j].sum() + problem.cut_L[j - 1])
        for i, j, c in zip(bounds, bounds[1:], meshes, strict=False)
    )
    return Partition(
        bounds, tuple(int(c) for c in meshes), times, pipeline_time(times, problem.microbatches)
    )


# Dynamic program
# -------------------------------------------------------------------------------------------------


def _interval_times(problem: _Problem) -> np.ndarray:
    """[C, L + 1, L + 1] time of a stage of layers i..j - 1; inf where it is empty."""
    edge = np.arange(problem.layers + 1)
    time_CxIxJ = _interval_sums(problem.time_CxL) + np.append(0.0, problem.cut_L)
    return np.where(edge[:, None] < edge, time_CxIxJ, np.inf)


def _interval_fits(problem: _Problem) -> np.ndarray:
    """[S, C, L + 1, L + 1] whether layers i..j - 1 fit stage s on sub-mesh c."""
    limit_Sx1x1x1 = problem.limit_S[:, None, None, None]
    return _interval_sums(problem.memory_SxCxL) <= limit_Sx1x1x1 * (1 + TOLERANCE)


def _interval_sums(values_L: np.ndarray) -> np.ndarray:
    """[..., L + 1, L + 1] sum of values i..j - 1 along the last dim; no differences of long sums,
    which would round.
    """
    layers = values_L.shape[-1]
    sums = np.zeros((*values_L.shape[:-1], layers + 1, layers + 1))
    for i in range(layers):
        sums[..., i, i + 1 :] = np.cumsum(values_L[..., i:], axis=-1)
    return sums


def _capped(cost_SxCxIxJ: np.ndarray, t_max: float) -> np.ndarray:
    return np.where(cost_SxCxIxJ <= t_max, cost_SxCxIxJ, np.inf)


def _least_sum(
    cost_SxCxIxJ: np.ndarray, problem: _Problem, bottleneck: bool = False
) -> tuple[float, list[int], list[int]]:
    """Least Σ cost (or least max cost) of a partition, with its starts and sub-meshes; (inf, [],
    []) if there is none.

    F[s, d, j] = min over sub-meshes c and first layers i of F[s - 1, d - size_c, i] + cost[s, c, i,
    j]."""
    stages, layers, devices = problem.stages, problem.layers, problem.devices
    join = np.maximum if bottleneck else np.add
    best_DxJ = np.full((devices + 1, layers + 1), np.inf)
    best_DxJ[0, 0] = 0.0
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    for s in range(stages):
        new_DxJ = np.full_like(best_DxJ, np.inf)
        start_DxJ, mesh_DxJ = np.zeros(new_DxJ.shape, int), np.zeros(new_DxJ.shape, int)
        for c, size in enumerate(problem.size_C):
            if size > devices:
                continue
            reached_DxIxJ = join(best_DxJ[: devices + 1 - size, :, None], cost_SxCxIxJ[s, c])
            first_DxJ = reached_DxIxJ.argmin(1)
            value_DxJ = np.take_along_axis(reached_DxIxJ, first_DxJ[:, None], 1)[:, 0]
            better_DxJ = value_DxJ < new_DxJ[size:]
            for table, values in ((new_DxJ, value_DxJ), (start_DxJ, first_DxJ), (mesh_DxJ, c)):
                table[size:] = np.where(better_DxJ, values, table[size:])
        best_DxJ = new_DxJ
        chosen.append((start_DxJ, mesh_DxJ))
    if not np.isfinite(best_DxJ[devices, layers]):
        return np.inf, [], []
    starts, meshes, d = [layers], [], devices
    for start_DxJ, mesh_DxJ in reversed(chosen):
        meshes.append(int(mesh_DxJ[d, starts[-1]]))
        starts.append(int(start_DxJ[d, starts[-1]]))
        d -= int(problem.size_C[meshes[-1]])
    return float(best_DxJ[devices, layers]), starts[::-1], meshes[::-1]


def _what_binds(problem: _Problem) -> str:
    """Why no partition exists: the devices, or the memory and by how much."""
    edge = np.arange(problem.layers + 1)
    shape = (problem.stages, len(problem.size_C), len(edge), len(edge))
    used_SxCxIxJ = _interval_sums(problem.memory_SxCxL)
    limit_Sx1x1x1 = np.broadcast_to(problem.limit_S[:, None, None, None], shape)
    load_SxCxIxJ = np.where(used_SxCxIxJ > 0, np.inf, 0.0)
    np.divide(used_SxCxIxJ, limit_Sx1x1x1, out=load_SxCxIxJ, where=limit_Sx1x1x1 > 0)
    load_SxCxIxJ = np.where(edge[:, None] < edge, load_SxCxIxJ, np.inf)
    anything = np.where(edge[:, None] < edge, 0.0, np.inf) + np.zeros(shape)
    sizes = problem.size_C.tolist()
    if not np.isfinite(_least_sum(anything, problem)[0]):
        return (
            f"devices bind: {problem.stages} stages on sub-meshes of sizes {sizes} cannot use "
            "exactly "
            f"devices = {problem.devices}; choose sizes that add up"
        )
    factor, starts, meshes = _least_sum(load_SxCxIxJ, problem, bottleneck=True)
    if not meshes:
        limits = problem.limit_S.tolist()
        return f"memory binds: a limit of 0 in memory_limits = {limits} cannot hold any stage"
    loads = [load_SxCxIxJ[s, c, starts[s], starts[s + 1]] for s, c in enumerate(meshes)]
    s = int(np.argmax(loads))
    layers = f"layers {starts[s]}..{starts[s + 1] - 1}"
    return (
        f"memory binds: even in the best balanced partition stage {s} ({layers}) needs "
        f"{used_SxCxIxJ[s, meshes[s], starts[s], starts[s + 1]]:.6g} bytes > memory_limits[{s}] = "
        f"{problem.limit_S[s]:.6g}; raise the limits by a factor {factor:.4g} or use more stages"
    )


# Integer program
# -------------------------------------------------------------------------------------------------


class _Rows:
    """Sparse rows lo <= A x <= hi, collected one by one."""

    def __init__(self) -> None:
        self.row: list[int] = []
        self.column: list[int] = []
        self.value: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        for column, value in terms:
            self.row.append(len(self.low))
            self.column.append(column)
            self.value.append(value)
        self.low.append(low)
        self.high.append(high)

    def constraint(self, columns: int) -> LinearConstraint:
        matrix = coo_array((self.value, (self.row, self.column)), shape=(len(self.low), columns))
        return LinearConstraint(matrix.tocsr(), self.low, self.high)


def _program(problem: _Problem) -> tuple[np.ndarray, LinearConstraint, np.ndarray, np.ndarray]:
    """Objective, constraints, integrality and upper bounds of `partition_ilp` over the variables z,
    u, y, t.
    """
    stages, meshes, layers = problem.memory_SxCxL.shape
    z_SxL = np.arange(stages * layers).reshape(stages, layers)
    u_SxC = z_SxL.size + np.arange(stages * meshes).reshape(stages, meshes)
    y_SxCxL = (
        z_SxL.size
        + u_SxC.size
        + np.arange(stages * meshes * layers).reshape(stages, meshes, layers)
    )
    t = z_SxL.size + u_SxC.size + y_SxCxL.size
    # HiGHS has absolute tolerances: a mean stage takes 1, and a full stage holds 1.
    unit = problem.time_CxL.min(0).sum() / stages or 1.0
    time_CxL, cut_L = problem.time_CxL / unit, problem.cut_L / unit
    rows = _Rows()
    cost = np.zeros(t + 1)
    cost[t] = problem.microbatches - 1
    rows.add(
        [(u, size) for u_C in u_SxC for u, size in zip(u_C, problem.size_C, strict=True)],
        *[problem.devices] * 2,
    )
    for s in range(stages):
        before_L = [[(z, -1.0)] for z in z_SxL[s - 1]] if s else [[]] * layers
        rows.add([(u, 1.0) for u in u_SxC[s]], 1, 1)
        rows.add([(z, 1.0) for z in z_SxL[s]] + list(chain(*before_L)), 1, np.inf)  # not empty
        stage_time = [(z_SxL[s, l], cut_L[l] - (cut_L[l - 1] if l else 0.0)) for l in range(layers)]
        for l in range(layers):
            if l:
                rows.add([(z_SxL[s, l - 1], 1.0), (z_SxL[s, l], -1.0)], 0, 1)
            in_stage = [(y, -1.0) for y in y_SxCxL[s, :, l]]
            rows.add([(z_SxL[s, l], 1.0), *before_L[l], *in_stage], 0, 0)
            stage_time += [(y_SxCxL[s, c, l], time_CxL[c, l]) for c in range(meshes)]
            if meshes > 1:
                for c in range(meshes):
                    rows.add([(y_SxCxL[s, c, l], 1.0), (u_SxC[s, c], -1.0)], -1, 0)
        limit = problem.limit_S[s] if 0 < problem.limit_S[s] < np.inf else 1.0
        held = zip(y_SxCxL[s].ravel(), problem.memory_SxCxL[s].ravel() / limit, strict=True)
        rows.add(list(held), -np.inf, problem.limit_S[s] / limit * (1 + TOLERANCE))
        rows.add([(t, 1.0), *((column, -value) for column, value in stage_time)], 0, np.inf)
        for column, value in stage_time:
            cost[column] += value
    rows.add([(z_SxL[-1, -1], 1.0)], 1, 1)
    integrality, upper = np.zeros(t + 1), np.ones(t + 1)
    integrality[: y_SxCxL.flat[0]] = 1
    upper[t] = np.inf
    return cost, rows.constraint(t + 1), integrality, upper
