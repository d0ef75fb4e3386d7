"""Cost classes of image diffusion: samples whose steps cost alike, chosen by their noise level.

A batch is arranged so that its rows repeat one pattern of classes. Every contiguous share of whole
patterns (a device, a microbatch) then holds the same number of rows of each class, so shapes are
static and each class has one program. The noise is drawn first, and rows are put into the places of
their class afterwards: the noise of a sample never depends on where it lay in the batch.

Legend: B rows, U rows of a pattern."""

from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_static
@dataclass(frozen=True)
class CostClass:
    """What a step of a sample computes. `patch`: edge of its patches, in those of the finest.
    `group`: of so many neighbouring tokens the layers see one; 1 drops none. `twice`: a forward
    pass without gradient comes first, whose estimate is an input (self-conditioning)."""

    patch: int = 1
    group: int = 1
    twice: bool = False


PLAIN = CostClass()


@jax.tree_util.register_static
@dataclass(frozen=True)
class CostClasses:
    """The class of every row of a batch: `pattern`, repeated. A leaf-less part of the batch."""

    pattern: tuple[CostClass, ...] = (PLAIN,)

    @property
    def classes(self) -> tuple[CostClass, ...]:
        """The different classes, in the order of their first row."""
        return tuple(dict.fromkeys(self.pattern))

    @property
    def only(self) -> CostClass:
        """The class of all rows. Raises ValueError for several: take `parts` first."""
        if len(self.classes) > 1:
            raise ValueError(
                f"rows have {len(self.classes)} cost classes, and a program has one: split the "
                "batch with the objective's `parts`"
            )
        return self.classes[0]

    def rows(self, cost: CostClass) -> np.ndarray:
        """The places of a class in the pattern."""
        return np.array([i for i, one in enumerate(self.pattern) if one == cost])

    def parts(self, noised: Any) -> tuple[Any, ...]:
        """The rows of each class of a batch (or a device's whole patterns of it), as batches."""
        if len(self.classes) == 1:
            return (noised,)
        unit, arrays = len(self.pattern), noised | {"cost": None}

        def chosen(cost: CostClass) -> Any:
            at = self.rows(cost)

            def take(x: jax.Array) -> jax.Array:
                return x.reshape(-1, unit, *x.shape[1:])[:, at].reshape(-1, *x.shape[1:])

            return jax.tree.map(take, arrays) | {"cost": CostClasses((cost,))}

        return tuple(chosen(cost) for cost in self.classes)


@dataclass(frozen=True)
class CostLaw:
    """The class of a sample by the rank of its noise level among all levels.

    `coarse`: share of the levels, the highest, that get patches of twice the edge (Anagnostidis et
    al. 2025, FlexiDiT). `dropped`: share, the highest, of whose neighbouring `group` tokens one is
    kept, the others becoming a mask token (Zheng et al. 2023, MaskDiT). `twice`: half of the
    samples are self-conditioned (Chen et al. 2022)."""

    coarse: Fraction = Fraction(0)
    dropped: Fraction = Fraction(0)
    group: int = 2
    twice: bool = False

    @property
    def ranks(self) -> int:
        """Into how many equal shares the noise levels are cut."""
        return lcm(self.coarse.denominator, self.dropped.denominator)

    @property
    def coarse_from(self) -> Fraction | None:
        """Rank of the noise, 0 to 1, from which patches are coarse; None where none are."""
        return 1 - self.coarse if self.coarse else None

    @property
    def costs(self) -> CostClasses:
        """The pattern of classes, by noise level and then self-conditioning."""
        found = []
        for rank in range(self.ranks):
            above = Fraction(self.ranks - rank, self.ranks)  # share of the levels from here on
            patch = 2 if above <= self.coarse else 1
            group = self.group if above <= self.dropped else 1
            found += [
                CostClass(patch, group, t) for t in ((False, True) if self.twice else (False,))
            ]
        return CostClasses(tuple(found))

    def places(self, key: jax.Array, stratum_B: jax.Array) -> jax.Array:
        """The row that goes to each place of a batch, int32 [B], given the stratum 0..B-1 of the
        noise of each row. Self-conditioned rows are a random half of each rank.

        Raises ValueError unless whole patterns fill the batch."""
        n, unit = len(stratum_B), len(self.costs.pattern)
        if n % unit:
            raise ValueError(
                f"a batch of {n} rows is not whole patterns of cost classes: batch % rows of the "
                f"pattern = {n} % {unit}; set train.batch={-(-n // unit) * unit}"
            )
        rank_B = stratum_B * self.ranks // n
        shuffled_B = jnp.argsort(jax.random.bits(key, (n,)))
        row_B = shuffled_B[jnp.argsort(rank_B[shuffled_B], stable=True)]
        place_B = np.argsort(np.arange(n) % unit, kind="stable")
        return jnp.zeros(n, jnp.int32).at[place_B].set(row_B.astype(jnp.int32))
