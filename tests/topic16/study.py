"""Which group does an image belong to? A layer, a loss, a batch, model state, a rule, an array
metric and a hook that core has never heard of.

Legend: B images, X·Y pixels, D width, G groups (local over tp)."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp import process
from fdp.collectives import all_gather, psum, size, vary
from fdp.data.batches import Arrays, Data
from fdp.experiment import Experiment, standard
from fdp.hooks import Hook
from fdp.models.module import Module, compact, initializers
from fdp.objectives.base import Objective
from fdp.study.measure import measure
from fdp.study.report import Row

X, Y, D = 8, 4, 16


class Herd(Module):
    """Groups compete for images; a bias without gradient keeps them level."""

    groups: int

    @compact
    def __call__(self, x_BxD):
        G = self.groups
        w = self.weight("w", initializers.normal(D**-0.5), (D, G), (None, "tp"))
        bias = self.model_state("bias", jnp.zeros, (G,), ("tp",))
        score_BxG = all_gather(vary(x_BxD, "tp") @ w, "tp", dim=1)
        chosen_B = (score_BxG + all_gather(bias, "tp", dim=0)).argmax(-1)
        load_G = jax.nn.one_hot(chosen_B, G).sum(0)
        # Devices of tp agree, which the mean over them states; those of cp see the same images.
        self.aux("load", psum(load_G, "tp") / size(("tp", "cp")))
        return psum(score_BxG, "tp") / size("tp")


class Images(Module):
    """Rows of an image, shared out over cp, to scores of groups."""

    groups: int

    def setup(self):
        self.herd = Herd(self.groups)
        self.project = Project()

    def embed(self, noised):
        return self.project(noised["image"])

    def stack(self, x_BxD, noised):
        return self.herd(jax.nn.gelu(x_BxD))

    def outputs(self, x_BxG):
        return x_BxG

    def __call__(self, noised):
        return self.outputs(self.stack(self.embed(noised), noised))


class Project(Module):
    """Mean over all pixels of a nonlinear map: the rows of other devices of cp are summed in."""

    @compact
    def __call__(self, image_BxXxY):
        w = self.weight("w", initializers.normal(1.0), (Y, D), (None, None))
        return psum(jnp.tanh(vary(image_BxXxY, "cp") @ w).sum(1), "cp") / X


@dataclass(frozen=True)
class Labels(Objective):
    """Cross entropy of images that count: the weight of an image comes with the data."""

    groups: int

    @property
    def dims(self):
        return {"image": ("batch", "sequence", None), "rows": ("batch",)}

    def corrupt(self, key, batch):
        noise = 0.1 * jax.random.normal(key, batch["image"].shape)
        rows = {"label": batch["label"], "weight": batch["weight"]}
        return {"image": batch["image"] + noise, "rows": rows}

    def count(self, noised):
        return noised["rows"]["weight"].sum()

    def loss(self, outputs_BxG, rows):
        logp_BxG = jax.nn.log_softmax(outputs_BxG)
        picked_B = jnp.take_along_axis(logp_BxG, rows["label"][:, None], 1)[:, 0]
        # Every device of cp holds the whole loss of its images: each states its share.
        return -rows["weight"] * picked_B / size("cp")


def images(groups: int, n: int = 64) -> Data:
    """Noise whose mean tells the label."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, groups, n).astype(np.int32)
    fields = {
        "image": (rng.normal(size=(n, X, Y)) + label[:, None, None]).astype(np.float32),
        "label": label,
        "weight": rng.integers(0, 3, n).astype(np.float32),
    }
    split = Arrays(fields, "images", "draw more")
    dims = {"image": ("batch", "sequence", None), "label": ("batch",), "weight": ("batch",)}
    return Data("noise", "0" * 64, "none", None, split, split, dims)


@dataclass(frozen=True)
class Level:
    """Lower the bias of groups that are asked for more than their share."""

    rate: float

    def __call__(self, state: Any, aux: Any, step: Any) -> Any:
        load = aux["herd"]["load"]
        moved = state["herd"]["bias"] - self.rate * jnp.sign(load - load.mean())
        return {"herd": {"bias": moved}}


def weight_norm(arm, step, state):
    """The hook: columns of the weights."""
    w = process.fetch(state.params["herd"]["w"])
    return {"column norms": np.linalg.norm(w, axis=0), "norm": float(np.linalg.norm(w))}


def arms(config) -> dict[str, Experiment]:
    """One arm; all that is taken from core is the optimizer and the loop."""
    h, stock = config.herding, config.copy_and_resolve_references()
    stock.data.source = "blank"
    base = standard(stock)
    made = replace(
        base,
        model=Images(h.groups),
        objective=Labels(h.groups),
        data=images(h.groups),
        rules=(Level(h.rate),),
        hooks=(Hook("weights", h.measure_every, weight_norm),),
    )
    return {"herd": made}


def study(run):
    """One measurement and its row."""
    return run.report(measure("bias", largest_bias, run.arms["herd"][0], rows=has_moved))


def largest_bias(arm) -> float:
    """Of the groups."""
    return float(np.abs(np.asarray(arm.trained_on_host.model["herd"]["bias"])).max())


def has_moved(bias: float) -> Row:
    """The row."""
    texts = "the bias has moved", "largest bias", bias, "", "value >= 0", "measured"
    return Row.judged(*texts, decides=True)
