"""The one file that imports flax.linen.

A module states each parameter by its GLOBAL shape and the mesh axis of every dim, and gets the
shard of this device. The metadata of a parameter hold what an optimizer or ZeRO must know.

There are five collections. "params" are learned. "state" has no gradient and is changed by rules.
"aux" holds metrics of a pass, "penalty" what it adds to the training loss. "cache" is the state of
decoding. `run` returns metrics and cache, `learn` metrics and penalty."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax
import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from fdp.collectives import size

Array = jax.Array
Axes = tuple[Any, ...]  # of every dim: a mesh axis, several or None

compact, broadcast = nn.compact, nn.broadcast
initializers, silu = nn.initializers, nn.silu

AUX, CACHE, PROBE, PENALTY = "aux", "cache", "probe", "penalty"
COLLECTIONS = ("params", "state", AUX, CACHE, PROBE, PENALTY)


class _Boxed(nn.Partitioned):
    """A variable with its metadata: the mesh axis of every dim, whether weight decay applies,
    whether dim 0 is the stack of layers, and whether a metric is a mean over microbatches."""

    decay: bool = flax.struct.field(default=False, pytree_node=False)
    stacked: bool = flax.struct.field(default=False, pytree_node=False)
    mean: bool = flax.struct.field(default=False, pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value. Shardings are set where a program is jitted, not here."""
        return self.value

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Boxed":
        """As in Flax; the variable now has a leading dim of layers."""
        boxed: Any = super().add_axis(index, params)  # Flax types it as the base class
        return boxed.replace(stacked=True)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Boxed":
        """As in Flax; the variable of one layer of the stack."""
        boxed: Any = super().remove_axis(index, params)
        return boxed.replace(stacked=False)


@dataclass(frozen=True)
class Meta:
    """Metadata of a parameter besides shape and spec."""

    decay: bool
    stacked: bool


class Module(nn.Module):
    """A pure module, written per shard. Outside shard_map every axis has size 1, so a shard is the
    whole."""

    def weight(
        self,
        name: str,
        init: Callable[..., Array],
        shape: tuple[int, ...],
        axes: Axes,
        decay: bool | None = None,
    ) -> Array:
        """The shard of a float32 parameter of GLOBAL `shape`, sharded by `axes`.

        `decay`: whether weight decay applies; by default to arrays of two or more dims. Raises
        ValueError where axes and dims differ in number or a degree does not divide its dim."""
        decay = len(shape) > 1 if decay is None else decay

        def boxed(*args: Any) -> Any:
            return _Boxed(init(*args), axes, decay=decay)

        return self.param(name, boxed, _share(name, shape, axes))

    def model_state(
        self, name: str, init: Callable[..., Array], shape: tuple[int, ...], axes: Axes
    ) -> Array:
        """The shard of a state without gradient, such as a router's bias; `init(shape)`."""

        def make() -> Any:
            return _Boxed(init(_share(name, shape, axes)), axes)

        return self.variable("state", name, make).value

    def aux(self, name: str, value: Array, mean: bool = False) -> None:
        """Report a metric: the summand of this device, equal over tp. The step adds up devices and
        microbatches; `mean`: it takes the mean over microbatches. A stack adds a leading dim of
        layers."""
        if self.is_mutable_collection(AUX):
            self.put_variable(AUX, name, _Boxed(value, (None,) * value.ndim, mean=mean))

    def penalty(self, name: str, value: Array) -> None:
        """Add a scalar to the training loss: the summand of this device, equal over tp. Its sum
        over the data axes must not depend on the mesh."""
        if self.is_mutable_collection(PENALTY) and not self.is_initializing():
            self.put_variable(PENALTY, name, value)

    def cached(self, name: str) -> Any:
        """The array, or the tree of arrays, stored under `name` in the cache. Raises ValueError
        where no writable cache holds it."""
        if not (self.has_variable(CACHE, name) and self.is_mutable_collection(CACHE)):
            raise ValueError(
                f"no cache holds {name!r}: give `run` the cache of a pass with keep_cache=True or "
                "of the model's decode_state"
            )
        return self.get_variable(CACHE, name)

    def held(self, name: str) -> Any:
        """As `cached`, also in a pass that only reads the cache."""
        if not self.has_variable(CACHE, name):
            raise ValueError(
                f"no cache holds {name!r}: give `run` that of the model's decode_state"
            )
        return self.get_variable(CACHE, name)

    def cache(self, name: str, value: Any) -> None:
        """Store an array, or a tree of arrays, for the next decoding step; does nothing where no
        cache is kept."""
        if self.is_mutable_collection(CACHE) and not self.is_initializing():
            self.put_variable(CACHE, name, value)

    def probe(self, name: str, value: Array) -> None:
        """Show `value` to `probed`, for studies; does nothing otherwise."""
        if self.is_mutable_collection(PROBE) and not self.is_initializing():
            self.put_variable(PROBE, name, value)


def _share(name: str, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(shape)} dims {shape} but {len(axes)} axes {axes}")
    for n, axis in zip(shape, axes, strict=True):
        if axis and n % size(axis):
            raise ValueError(f"{name}: dim {n} of {shape} is not divisible by {axis}={size(axis)}")
    return tuple(n // size(axis) if axis else n for n, axis in zip(shape, axes, strict=True))


def stack(
    block: Callable[..., Module],
    periods: int,
    remat: Callable[..., bool] | None = None,
    gather: Callable[[Any], Any] | None = None,
) -> Any:
    """`block` scanned over `periods` (global; each pp shard runs its share), as a class.

    It is called as `(carry, shared, per_layer) → (carry, None)`, where the leading dim of
    `per_layer` is the periods. `remat`: rematerialisation policy. `gather`: from the stored to the
    gathered parameters of one period, inside the rematerialised scan (ZeRO-3)."""
    made: Any = block
    if gather is not None:

        def whole(variables: Mapping[str, Any]) -> dict[str, Any]:
            return {"params": gather(variables["params"])}

        made = nn.map_variables(made, "params", trans_in_fn=whole)
    if remat is not None:
        made = nn.remat(made, policy=remat, prevent_cse=False)
    return nn.scan(
        made,
        variable_axes=dict.fromkeys(COLLECTIONS, 0),
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=periods // size("pp"),
        metadata_params={nn.PARTITION_NAME: "pp"},
    )


Variables = dict[str, Any]  # {"params": …} and, where the model has some, {"state": …}


def init(model: Module, key: Array, *example: Any) -> Variables:
    """{"params", "state"} at global shapes, equal on every mesh. Call it under jit with
    out_shardings."""
    variables = nn.meta.unbox(_boxed(model, key, *example))
    return {name: variables[name] for name in ("params", "state")}


def abstract(model: Module, *example: Any) -> tuple[Variables, Variables, Variables]:
    """(ShapeDtypeStructs, PartitionSpecs, Metas) of {"params", "state", "aux"}, without computing
    anything.

    Aux is as `run` returns it; stacked dims are sharded over pp."""
    boxed = jax.eval_shape(lambda *x: _boxed(model, jax.random.key(0), *x), *example)
    metas = jax.tree.map(lambda b: Meta(b.decay, b.stacked), boxed, is_leaf=_is_boxed)
    return nn.meta.unbox(boxed), nn.get_partition_spec(boxed), metas


def _is_boxed(x: Any) -> bool:
    return isinstance(x, _Boxed)


def _boxed(model: Module, key: Array, *example: Any) -> Variables:
    variables = model.init(key, *example)
    return {name: variables.get(name, {}) for name in ("params", "state", AUX)}


def run(
    model: Module,
    variables: Mapping[str, Any],
    *args: Any,
    method: str | None = None,
    cache: Any = None,
    keep_cache: bool = False,
    write: bool = True,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(output, aux, cache) of `method`. The cache is {} unless one is given or kept. `write` False:
    the given cache is only read, by layers that can, and {} is returned for it."""
    out, new = _apply(model, variables, args, method, cache, keep_cache, write)
    return out, nn.meta.unbox(new.get(AUX, {})), dict(new.get(CACHE, {}))


def learn(
    model: Module,
    variables: Mapping[str, Any],
    *args: Any,
    method: str | None = None,
    share: float = 1.0,
) -> tuple[Any, dict[str, Any], Array | None]:
    """(output, aux, sum of the penalties) of `method` in training; None without penalties.

    share: of this pass in its step, 1 / microbatches; penalties and metrics that are means over
    microbatches are multiplied by it."""
    out, new = model.apply(dict(variables), *args, mutable=[AUX, PENALTY], method=method)

    def metric(boxed: _Boxed) -> Array:
        return boxed.value * share if boxed.mean else boxed.value

    aux = jax.tree.map(metric, new.get(AUX, {}), is_leaf=_is_boxed)
    terms = [x.sum() for x in jax.tree.leaves(new.get(PENALTY, {}))]
    return out, aux, share * sum(terms[1:], terms[0]) if terms else None


def probed(
    model: Module, variables: Mapping[str, Any], *args: Any, method: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """(output, the values passed to `Module.probe`)."""
    out, new = model.apply(dict(variables), *args, mutable=[PROBE], method=method)
    return out, dict(new.get(PROBE, {}))


def _apply(
    model: Module,
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    method: str | None,
    cache: Any = None,
    keep_cache: bool = False,
    write: bool = True,
) -> tuple[Any, Any]:
    given = dict(variables) | ({} if cache is None else {CACHE: cache})
    mutable = [AUX] + ([CACHE] if keep_cache or (write and cache is not None) else [])
    return model.apply(given, *args, mutable=mutable, method=method)


def check_leaves(given: Any, expected: Any, what: str = "parameters") -> None:
    """Raises ValueError naming leaves that are missing, unknown or of another shape."""
    have, want = _by_path(given), _by_path(expected)
    lines = [f"missing: {name} {want[name].shape}" for name in want.keys() - have.keys()]
    lines += [f"unknown: {name} {have[name].shape}" for name in have.keys() - want.keys()]
    lines += [
        f"{name} has shape {have[name].shape}, not {want[name].shape}"
        for name in have.keys() & want.keys()
        if have[name].shape != want[name].shape
    ]
    if lines:
        raise ValueError(f"these {what} are not the model's: " + "; ".join(sorted(lines)))


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, such as "layers/w_q"."""
    return {
        "/".join(str(getattr(k, "key", k)) for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def spec_leaf(x: Any) -> bool:
    """For `jax.tree.map(…, is_leaf=spec_leaf)`: PartitionSpecs are leaves."""
    return isinstance(x, PartitionSpec)
