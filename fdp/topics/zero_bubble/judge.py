"""A small classifier of the run's own images: whether samples are read as what was asked for, and
how far they are from the data in its features.

Legend: B images, H rows, W columns, C channels, N images of a split, D features, K classes."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdp.data.batches import Data

WIDTHS = (24, 48, 96)  # channels of the three convolutions, each of which halves the image
FEATURES = 24
BATCH = 64
SHIFT = 2  # pixels, at random, of training images
CHUNK = 256  # images of a pass


@dataclass(frozen=True)
class Judge:
    """A trained classifier. accuracy: on held-out images."""

    parameters: dict[str, np.ndarray]
    accuracy: float
    classes: int

    def read(self, images_BxHxWxC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features f32 [B, D], labels int [B]) of images."""
        parts = np.split(images_BxHxWxC, range(CHUNK, len(images_BxHxWxC), CHUNK))
        found = [_read(self.parameters, part) for part in parts]
        features, scores = (np.concatenate([np.asarray(x[i]) for x in found]) for i in range(2))
        return features, scores.argmax(-1)


def trained(data: Data, classes: int, steps: int) -> Judge:
    """A classifier of `data`, trained for so many steps of BATCH images."""
    images, labels = whole(data.train)
    rng, optimizer = np.random.default_rng(0), optax.adamw(3e-3, weight_decay=0.05)
    parameters = _init(rng, images.shape[-1], classes)
    state = optimizer.init(parameters)
    for _ in range(steps):
        chosen = rng.integers(0, len(images), BATCH)
        moved = _moved(images[chosen], rng.integers(-SHIFT, SHIFT + 1, 2))
        parameters, state = _step(optimizer.update, parameters, state, moved, labels[chosen])
    held, truth = whole(data.val)
    judge = Judge({k: np.asarray(x) for k, x in parameters.items()}, 0.0, classes)
    right = float((judge.read(held)[1] == truth).mean())
    return Judge(judge.parameters, right, classes)


def whole(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a whole split."""
    found = split.take(range(len(split)))
    return found["images"], found["labels"]


def frechet(one_NxD: np.ndarray, other_NxD: np.ndarray) -> float:
    """Distance of two normal distributions with the means and covariances of these features
    (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)."""
    a, b = np.cov(one_NxD.T), np.cov(other_NxD.T)
    root = _root(a)
    middle = _root(root @ b @ root)
    gap = one_NxD.mean(0) - other_NxD.mean(0)
    return float(gap @ gap + np.trace(a) + np.trace(b) - 2 * np.trace(middle))


def nearest(samples: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index int [B] of the nearest image, root mean squared difference f64 [B])."""
    flat, other = (x.reshape(len(x), -1).astype(np.float64) for x in (samples, images))
    square = (flat**2).sum(1)[:, None] - 2 * flat @ other.T + (other**2).sum(1)
    at = square.argmin(1)
    least = np.maximum(square[np.arange(len(at)), at], 0) / flat.shape[1]
    return at, np.sqrt(least)


def _root(x_DxD: np.ndarray) -> np.ndarray:
    """The symmetric square root."""
    values, vectors = np.linalg.eigh(x_DxD)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _init(rng: np.random.Generator, channels: int, classes: int) -> dict[str, np.ndarray]:
    sizes = dict(zip(("a", "b", "c"), zip((channels, *WIDTHS), WIDTHS, strict=False), strict=True))
    found = {}
    for name, (n_in, n_out) in sizes.items():
        found[f"w_{name}"] = rng.normal(0, (2 / (9 * n_in)) ** 0.5, (3, 3, n_in, n_out))
        found[f"b_{name}"] = np.zeros(n_out)
    found["features"] = rng.normal(0, WIDTHS[-1] ** -0.5, (WIDTHS[-1], FEATURES))
    found["scores"] = rng.normal(0, FEATURES**-0.5, (FEATURES, classes))
    return {name: x.astype(np.float32) for name, x in found.items()}


def _apply(parameters: Any, x_BxHxWxC: Any) -> tuple[jax.Array, jax.Array]:
    """(features, scores)."""
    x = jnp.asarray(x_BxHxWxC)
    for name in ("a", "b", "c"):
        dims = ("NHWC", "HWIO", "NHWC")
        w, b = parameters[f"w_{name}"], parameters[f"b_{name}"]
        x = jax.nn.gelu(jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", None, None, dims) + b)
    features_BxD = jnp.tanh(x.mean((1, 2)) @ parameters["features"])
    return features_BxD, features_BxD @ parameters["scores"]


_read = jax.jit(_apply)


@functools.partial(jax.jit, static_argnums=0)
def _step(update: Any, parameters: Any, state: Any, images: Any, labels_B: Any) -> tuple[Any, Any]:
    def loss(parameters: Any) -> jax.Array:
        scores = 4 * _apply(parameters, images)[1]
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels_B).mean()

    updates, state = update(jax.grad(loss)(parameters), state, parameters)
    return optax.apply_updates(parameters, updates), state


def _moved(images: np.ndarray, by: np.ndarray) -> np.ndarray:
    """All images shifted by so many rows and columns, over a white edge (1.0)."""
    pad = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    wide = np.pad(images, pad, constant_values=1.0)
    i, j = SHIFT + by
    return wide[:, i : i + images.shape[1], j : j + images.shape[2]]
