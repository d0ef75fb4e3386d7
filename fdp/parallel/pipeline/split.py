"""The backward pass of a function in two parts: B, gradients of the inputs, and W, gradients of the
parameters.

Every equation of the fused backward pass is in exactly one part, so both together cost what it
costs. B hands W what W reads of it, the stash. A scan (a stack of layers) is cut through its body:
the scan of B stacks what each round of the scan of W reads. Calls (jit, checkpoint) are cut alike;
a conditional belongs to B as a whole.

W written as a second `jax.vjp` with respect to the parameters would compute the whole chain of
cotangents again. Source of the split: Qi et al. 2023 (arXiv 2401.10241), section 2."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

HEAVY = ("dot_general", "conv_general_dilated", "scan", "while", "cond", "pallas_call")
TYPING = ("pvary", "pcast")  # name axes, and send nothing
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


Function = Callable[[Any, Any], tuple[Any, Any]]


class Piece(NamedTuple):
    """Part of a program: values of `reads` → values of `defines`. Both are keys of an
    environment."""

    reads: tuple[Any, ...]
    defines: tuple[Any, ...]
    run: Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Cut:
    """A jaxpr cut in two: B computes the wanted outputs, W the others.

    first: inputs → (wanted outputs, stash). second: (inputs, stash) → other outputs. needs, reads:
    which inputs B and W read."""

    first: Callable[[Sequence[Any]], tuple[list[Any], list[Any]]]
    second: Callable[[Sequence[Any], Sequence[Any]], list[Any]]
    needs: tuple[bool, ...]
    reads: tuple[bool, ...]


def cut(closed: Any, wanted: Sequence[bool], free: Sequence[bool] = ()) -> Cut:
    """Cut a closed jaxpr so that B computes the `wanted` outputs and nothing that only others
    need. free: inputs that W has at no cost, parameters; none by default."""
    jaxpr = closed.jaxpr
    known = {v for v, is_free in zip(jaxpr.invars, free, strict=False) if is_free}
    outs = {
        w: [v for v, is_w in zip(jaxpr.outvars, wanted, strict=True) if is_w == w]
        for w in (True, False)
    }
    pieces_B, pieces_W = _partition(jaxpr, outs[True], known)
    reads_B, reads_W = _free(pieces_B, outs[True]), _free(pieces_W, outs[False])
    given = {*jaxpr.invars, *jaxpr.constvars}
    stash = [v for v in reads_W if v not in given]
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def first(inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        env = _evaluate(pieces_B, consts | dict(zip(jaxpr.invars, inputs, strict=True)))
        return [_value(env, v) for v in outs[True]], [env[v] for v in stash]

    def second(inputs: Sequence[Any], stashed: Sequence[Any]) -> list[Any]:
        env = consts | dict(zip(jaxpr.invars, inputs, strict=True))
        env = _evaluate(pieces_W, env | dict(zip(stash, stashed, strict=True)))
        return [_value(env, v) for v in outs[False]]

    needs = tuple(v in reads_B for v in jaxpr.invars)
    return Cut(first, second, needs, tuple(v in reads_W for v in jaxpr.invars))


def _evaluate(pieces: Iterable[Piece], env: dict[Any, Any]) -> dict[Any, Any]:
    for p in pieces:
        env |= dict(zip(p.defines, p.run(*(_value(env, v) for v in p.reads)), strict=True))
    return env


def _value(env: dict[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, core.Literal) else env[v]


def _free(pieces: Iterable[Piece], outs: Iterable[Any]) -> dict[Any, None]:
    """What pieces and outputs read without defining it, in order."""
    found: dict[Any, None] = {}
    defined: set[Any] = set()
    for p in pieces:
        found |= {v: None for v in p.reads if _variable(v) and v not in defined}
        defined |= set(p.defines)
    return found | {v: None for v in outs if _variable(v) and v not in defined}


def _variable(v: Any) -> bool:
    return not isinstance(v, core.Literal)


# Equations
# -------------------------------------------------------------------------------------------------


def _partition(
    jaxpr: Any, wanted: Sequence[Any], known: set[Any]
) -> tuple[list[Piece], list[Piece]]:
    """Pieces of B and of W, each in program order; `known`: free inputs."""
    needed = {v for v in wanted if _variable(v)}
    parts_B: list[Any] = []  # equations, or pieces of those that were cut
    parts_W: list[Any] = []
    for eqn in reversed(jaxpr.eqns):
        real = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
        mine = [v in needed for v in eqn.outvars]
        if not any(mine):
            parts_W.append(eqn)
            continue
        divided = None if all(v in needed for v in real) else _divide(eqn, mine, known)
        if divided is None:
            parts_B.append(eqn)
            needed |= {v for v in eqn.invars if _variable(v)}
        else:
            parts_B.append(divided[0])
            parts_W.append(divided[1])
            needed |= {v for v in divided[0].reads if _variable(v)}
    if all(v in needed for v in jaxpr.outvars if _variable(v)):
        return _pieces(jaxpr, parts_B[::-1]), []  # nothing is left that W could compute
    parts_B, parts_W = _thrifty(parts_B[::-1], parts_W[::-1], jaxpr)
    parts_W = _again(parts_B, parts_W, known) + parts_W
    return _pieces(jaxpr, parts_B), _pieces(jaxpr, parts_W)


def _again(parts_B: list[Any], parts_W: list[Any], known: set[Any]) -> list[Any]:
    """Cheap equations of B that W computes again instead of reading a stash, as they read nothing
    but parameters, such as casts."""
    cheap, known = [], set(known)
    for part in parts_B:
        if not _heavy(part) and all(v in known for v in _ins(part) if _variable(v)):
            known |= set(part.outvars)
            cheap.append(part)
    read = {v for part in parts_W for v in _ins(part) if _variable(v)}
    found: list[Any] = []
    for part in reversed(cheap):
        if read & set(part.outvars):
            found.append(part)
            read |= {v for v in part.invars if _variable(v)}
    return found[::-1]


def _heavy(part: Any) -> bool:
    """Whether to compute this costs more than to keep it: products, calls and collectives."""
    if isinstance(part, Piece) or part.primitive.name in HEAVY:
        return True
    values = list(part.params.values())
    axes = [part.params.get(key, ()) for key in ("axis_name", "axes")]
    moves = any(isinstance(a, str) for x in axes for a in (x if isinstance(x, tuple) else (x,)))
    calls = any(hasattr(getattr(x, "jaxpr", x), "eqns") for x in values)
    return calls or (moves and part.primitive.name not in TYPING)


def _thrifty(parts_B: list[Any], parts_W: list[Any], jaxpr: Any) -> tuple[list[Any], list[Any]]:
    """Cheap equations of W that shrink the stash go to B, such as the product of two activations
    that only a weight's gradient reads."""
    late = {v for part in parts_W for v in _outs(part)}
    readers: dict[Any, int] = {}
    for part in parts_W:
        for v in {v for v in _ins(part) if _variable(v)}:
            readers[v] = readers.get(v, 0) + 1
    for v in jaxpr.outvars:
        readers[v] = readers.get(v, 0) + 1 if _variable(v) else 0
    while True:
        kept = []
        for part in parts_W:
            inputs = {v for v in _ins(part) if _variable(v)}
            heavy = isinstance(part, Piece) or part.primitive.name in HEAVY
            saved = sum(_bytes(v) for v in inputs if readers[v] == 1) if not heavy else 0
            if heavy or inputs & late or sum(map(_bytes, part.outvars)) > saved:
                kept.append(part)
                continue
            parts_B.append(part)
            late -= set(part.outvars)
            for v in inputs:
                readers[v] -= 1
        if len(kept) == len(parts_W):
            return parts_B, kept
        parts_W = kept  # what moved may have been the second reader of something


def _ins(part: Any) -> Sequence[Any]:
    return part.reads if isinstance(part, Piece) else part.invars


def _outs(part: Any) -> Sequence[Any]:
    return part.defines if isinstance(part, Piece) else part.outvars


def _bytes(v: Any) -> int:
    return v.aval.size * v.aval.dtype.itemsize


def _pieces(jaxpr: Any, parts: Sequence[Any]) -> list[Piece]:
    """Equations in a row become one piece, so that their names and scopes stay."""
    found: list[Piece] = []
    row: list[Any] = []
    for part in [*parts, None]:
        if part is not None and not isinstance(part, Piece):
            row.append(part)
            continue
        if row:
            found.append(_of_equations(jaxpr, row))
        row = []
        if part is not None:
            found.append(part)
    return found


def _of_equations(jaxpr: Any, eqns: list[Any]) -> Piece:
    defines = tuple(v for e in eqns for v in e.outvars if not isinstance(v, core.DropVar))
    known = set(defines)
    reads = tuple(
        dict.fromkeys(v for e in eqns for v in e.invars if _variable(v) and v not in known)
    )
    part = jaxpr.replace(
        constvars=[], invars=list(reads), outvars=list(defines), eqns=eqns, effects=core.no_effects
    )
    return Piece(reads, defines, core.jaxpr_as_fun(core.ClosedJaxpr(part, ())))


def _divide(eqn: Any, wanted: Sequence[bool], known: set[Any]) -> tuple[Piece, Piece] | None:
    """An equation of which only some outputs are wanted, as a piece of B and one of W; None where
    it is not cut."""
    free = [_variable(v) and v in known for v in eqn.invars]
    if eqn.primitive.name == "scan":
        return _scan(eqn, wanted, free)
    if eqn.primitive.name in CALLS and "jaxpr" in eqn.params:
        return _call(eqn, wanted, free)
    return None


def _closed(jaxpr: Any) -> Any:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _choose(items: Sequence[Any], mask: Sequence[bool], value: bool = True) -> list[Any]:
    return [x for x, m in zip(items, mask, strict=True) if m == value]


def _fill(some: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """Inputs in their places, None where the mask is false."""
    given = iter(some)
    return [next(given) if m else None for m in mask]


class Stashed(NamedTuple):
    """Key of a value that one piece of an equation leaves to the other. -1: all of them."""

    eqn: int
    place: int = -1


def _call(eqn: Any, wanted: Sequence[bool], free: Sequence[bool]) -> tuple[Piece, Piece]:
    inner = cut(_closed(eqn.params["jaxpr"]), wanted, free)
    key = Stashed(id(eqn))

    def first(*given: Any) -> list[Any]:
        outs, stash = inner.first(_fill(given, inner.needs))
        return [*outs, stash]

    def second(stash: Any, *given: Any) -> list[Any]:
        return inner.second(_fill(given, inner.reads), stash)

    reads_B, reads_W = (tuple(_choose(eqn.invars, m)) for m in (inner.needs, inner.reads))
    outs_B, outs_W = (tuple(_choose(eqn.outvars, wanted, w)) for w in (True, False))
    return Piece(reads_B, (*outs_B, key), first), Piece((key, *reads_W), outs_W, second)


def _scan_sizes(params: Any) -> tuple[int, int]:
    """Numbers of constants and carries of a scan."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax ≥ 0.12
    return len(consts), len(carry)


def _scan(eqn: Any, wanted: Sequence[bool], free: Sequence[bool]) -> tuple[Piece, Piece]:
    """Two scans: that of B carries what the wanted outputs need, that of W the rest."""
    body = eqn.params["jaxpr"]
    c, n = _scan_sizes(eqn.params)
    inner, mine = _body(body, c, n, wanted, [*free[:c], *[False] * n, *free[c + n :]])
    carried = mine[:n]
    how = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    stash_key, carry_key = Stashed(id(eqn)), Stashed(id(eqn), 0)
    kept = [m and r for m, r in zip(carried, inner.reads[c : c + n], strict=True)]  # W reads them

    def first(*given: Any) -> list[Any]:
        whole = _fill(given, reads_B)
        consts, carry, xs = whole[:c], _choose(whole[c : c + n], carried), whole[c + n :]

        def one(carry: Any, xs: Any) -> Any:
            full = _fill(carry, carried)
            outs, stash = inner.first([*consts, *full, *xs])
            k = sum(carried)
            return outs[:k], (outs[k:], stash, _choose(full, kept))

        carry, (ys, stash, before) = jax.lax.scan(one, carry, xs, **how)
        return [*carry, *ys, stash, before]

    def second(stash: Any, before: Any, *given: Any) -> list[Any]:
        whole = _fill(given, reads_W)
        consts, carry, xs = whole[:c], _choose(whole[c : c + n], carried, False), whole[c + n :]

        def one(carry: Any, per: Any) -> Any:
            xs, stash, before = per
            rest, known = iter(carry), iter(before)
            full = [
                (next(known) if k else None) if m else next(rest)
                for m, k in zip(carried, kept, strict=True)
            ]
            outs = inner.second([*consts, *full, *xs], stash)
            k = n - sum(carried)
            return outs[:k], outs[k:]

        carry, ys = jax.lax.scan(one, carry, (xs, stash, before), **how)
        return [*carry, *ys]

    reads_B = [*inner.needs[:c], *carried, *inner.needs[c + n :]]
    reads_W = [*inner.reads[:c], *(not m for m in carried), *inner.reads[c + n :]]
    outs_B, outs_W = (tuple(_choose(eqn.outvars, mine, w)) for w in (True, False))
    return (
        Piece(tuple(_choose(eqn.invars, reads_B)), (*outs_B, stash_key, carry_key), first),
        Piece((stash_key, carry_key, *_choose(eqn.invars, reads_W)), outs_W, second),
    )


def _body(
    body: Any, c: int, n: int, wanted: Sequence[bool], free: Sequence[bool]
) -> tuple[Cut, list[bool]]:
    """The body cut so that no carry of B depends on one of W, and which outputs B computes."""
    mine = list(wanted)
    while True:
        inner = cut(body, mine, free)
        more = [m or need for m, need in zip(mine[:n], inner.needs[c : c + n], strict=True)]
        if more == mine[:n]:
            return inner, mine
        mine[:n] = more


# A function
# -------------------------------------------------------------------------------------------------

KEPT, CONSTANT, DERIVED = -1, -2, -3  # sources of residuals that are no parameters


@dataclass(frozen=True)
class Halves:
    """Forward, B and W of `f(params, x) → (y, aux)`; made by `halves`.

    Residuals are what the forward pass leaves to B. Those that are parameters, that follow from
    them alone at little cost, such as slices and casts, or that are the same for all data, are not
    kept. source: of each residual, the place of the parameter, KEPT, CONSTANT or DERIVED.
    constants, derived: B of the forward pass that finds those, of the leaves of the parameters."""

    cut: Cut
    constants: Callable[[], list[Any]]
    derived: Callable[[Sequence[Any]], list[Any]]
    params: Any  # tree of the parameters
    x: Any  # tree of the inputs
    source: tuple[int, ...]

    def forward(self, f: Function, params: Any, x: Any) -> tuple[Any, list[Any], Any]:
        """(y, residuals, aux). `f` may close over other values than the one that was cut."""
        y, pull, aux = jax.vjp(f, params, x, has_aux=True)
        leaves = jax.tree.leaves(pull)
        return y, [r for r, i in zip(leaves, self.source, strict=True) if i == KEPT], aux

    def input_gradients(
        self, params: Any, residuals: Sequence[Any], dy: Any
    ) -> tuple[Any, tuple[list[Any], list[Any]]]:
        """B: (gradient of x, stash)."""
        inputs = [*self._whole(params, residuals), *jax.tree.leaves(dy)]
        dx, stash = self.cut.first(inputs)
        read = [
            v for v, r, i in zip(inputs, self.cut.reads, self._from, strict=True) if r and i == KEPT
        ]
        return jax.tree.unflatten(self.x, dx), (read, stash)

    def weight_gradients(self, params: Any, stash: tuple[list[Any], list[Any]]) -> Any:
        """W: the gradients of the parameters."""
        read, rest = stash
        mask = [r and i == KEPT for r, i in zip(self.cut.reads, self._from, strict=True)]
        whole = self._whole(params, _choose(_fill(read, mask), [i == KEPT for i in self._from]))
        return jax.tree.unflatten(self.params, self.cut.second(whole, rest))

    @property
    def _from(self) -> list[int]:
        """Sources of all inputs of the backward pass: residuals, then cotangents."""
        return [*self.source, *[KEPT] * (len(self.cut.reads) - len(self.source))]

    def _whole(self, params: Any, kept: Sequence[Any]) -> list[Any]:
        """All residuals, and what else is in `kept`."""
        weights, given = jax.tree.leaves(params), iter(kept)
        found = {
            KEPT: given,
            CONSTANT: iter(self.constants()),
            DERIVED: iter(self.derived(weights)),
        }
        whole = [weights[i] if i >= 0 else next(found[i]) for i in self.source]
        return [*whole, *given]


def halves(f: Function, params: Any, x: Any, data: str = "") -> Halves:
    """`f` in halves, for arguments like these, which may be tracers.

    data: a mesh axis over which all data vary. Residuals that do not are the same for all data."""

    y, pull, _ = jax.vjp(f, params, x, has_aux=True)
    weights = {id(w): i for i, w in enumerate(jax.tree.leaves(params))}
    leaves = jax.tree.leaves(pull)
    many = len(jax.tree.leaves(x))
    again = jax.make_jaxpr(
        lambda params, x: jax.tree.leaves(jax.vjp(f, params, x, has_aux=True)[1])
    )(params, x)
    moved = _moved(again.jaxpr, [False] * len(weights) + [True] * many)

    def source_of(r: Any, moves: bool) -> int:
        fixed = data and data not in jax.typeof(r).mat.varying
        return weights.get(id(r), CONSTANT if fixed else KEPT if moves else DERIVED)

    source = tuple(map(source_of, leaves, moved))
    fixed, follows = (_only(again, [i == kind for i in source]) for kind in (CONSTANT, DERIVED))
    if any(fixed.needs):
        raise ValueError("a residual is typed the same for all data, and depends on them")
    nothing = [None] * len(fixed.needs)
    closed = jax.make_jaxpr(lambda pull, dy: pull(dy))(pull, y)
    parts = cut(closed, [False] * len(weights) + [True] * many, [i != KEPT for i in source])
    return Halves(
        parts,
        lambda: fixed.first(nothing)[0],
        lambda given: follows.first([*given, *[None] * many])[0],
        jax.tree.structure(params),
        jax.tree.structure(x),
        source,
    )


def _only(closed: Any, mask: Sequence[bool]) -> Cut:
    """What some outputs of a closed jaxpr need, as B; W computes nothing. Nothing else is left, in
    scans neither: a cut would move cheap equations of others, with all that they read, to B."""
    part, _ = dce_jaxpr(closed.jaxpr, list(mask), instantiate=True)
    return cut(core.ClosedJaxpr(part, closed.consts), [True] * sum(mask))


def _moved(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on the inputs of this mask, on constants, or on anything that
    costs more to compute than to keep."""
    moves = {*jaxpr.constvars, *_choose(jaxpr.invars, inputs)}
    for eqn in jaxpr.eqns:
        given = [_variable(v) and v in moves for v in eqn.invars]
        outs = _moved_by(eqn, given)
        moves |= {v for v, m in zip(eqn.outvars, outs, strict=True) if m}
    return [_variable(v) and v in moves for v in jaxpr.outvars]


def _moved_by(eqn: Any, given: Sequence[bool]) -> Sequence[bool]:
    """As `_moved`, of an equation."""
    if eqn.primitive.name in CALLS and "jaxpr" in eqn.params:
        return _moved(_closed(eqn.params["jaxpr"]).jaxpr, given)
    if eqn.primitive.name != "scan":
        return [any(given) or _heavy(eqn)] * len(eqn.outvars)
    c, n = _scan_sizes(eqn.params)
    mask = list(given)
    while True:
        outs = _moved(eqn.params["jaxpr"].jaxpr, mask)
        more = [a or b for a, b in zip(mask[c : c + n], outs[:n], strict=True)]
        if more == mask[c : c + n]:
            return outs
        mask[c : c + n] = more
