"""What a trained image model is worth: held-out loss by noise level, samples, and a judge of them.

Legend: B images, H rows, W columns, C channels, J noise levels."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp import process
from fdp.arm import Arm
from fdp.models import module
from fdp.objectives import ImageObjective
from fdp.objectives.cost import CostClass, CostClasses
from fdp.sampling.draw import draw_images
from fdp.state import TrainState
from fdp.topics.zero_bubble import judge
from fdp.topics.zero_bubble.fillers import without

LEVELS = 10  # equal shares of the noise
HELD = 256  # held-out images at most
SHOWN = 16  # samples beside their nearest training images
GUIDANCE = 2.0


@dataclass(frozen=True)
class Samples:
    """Of one arm. as_asked: share that the judge reads as asked. distance: Fréchet, to the training
    images. nearest: index of the nearest training image; gap_B, held_gap: root mean squared
    difference to it, of samples and (mean) of held-out images."""

    images: np.ndarray
    labels_B: np.ndarray
    as_asked: float
    distance: float
    nearest_B: np.ndarray
    gap_B: np.ndarray
    held_gap: float


@dataclass(frozen=True)
class Floor:
    """What the judge says of held-out images: their share read rightly, and their distance."""

    accuracy: float
    distance: float


def held_out(arm: Arm) -> np.ndarray:
    """Loss at the middle of each of LEVELS shares of the noise, f64 [J]: every held-out image with
    its label, the same noise for every arm."""
    return losses(arm, arm.trained_on_host.variables)


def watch_held_out(arm: Arm, step: int, state: TrainState) -> Mapping[str, Any]:
    """The hook that measures the mean of `held_out` while training: validation losses are of the
    arm's own targets and batches, which fillers change."""
    del step
    return {"hook/loss": float(losses(arm, state.variables).mean())}


def losses(arm: Arm, variables: Any) -> np.ndarray:
    """As `held_out`, of these variables."""
    images, labels = judge.whole(arm.data.val)
    objective = without(arm.objective)
    assert isinstance(objective, ImageObjective)
    images, labels = images[:HELD], labels[:HELD]
    variables = process.fetch(variables)
    found = []
    for j in range(LEVELS):
        rank_B = jnp.full(len(images), (j + 0.5) / LEVELS)
        coarse = objective.law.coarse_from
        cost = CostClass(patch=2 if coarse is not None and (j + 0.5) / LEVELS > coarse else 1)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(7), j), images.shape)
        loss = _loss(arm.model, objective, cost, variables, images, labels, rank_B, noise)
        found.append(float(loss))
    return np.array(found)


def judge_of(arm: Arm, steps: int) -> judge.Judge:
    """A classifier of the arm's data, trained for so many steps."""
    return judge.trained(arm.data, arm.model.image.classes, steps)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _loss(
    model: Any,
    objective: Any,
    cost: CostClass,
    variables: Any,
    x: Any,
    labels_B: Any,
    rank_B: Any,
    noise: Any,
) -> jax.Array:
    noised = objective.noised(x, noise, objective.sigma(rank_B))
    noised |= {"labels": labels_B, "cost": CostClasses((cost,)), "estimate": jnp.zeros_like(x)}
    rows = noised.pop("rows")
    return objective.loss(module.run(model, variables, noised)[0], rows).mean()


def asked(classes: int, count: int) -> np.ndarray:
    """Labels of `count` samples, as many of each class as there can be: int32 [B]."""
    return (np.arange(count) % classes).astype(np.int32)


def sampled(arm: Arm, state: TrainState, labels_B: np.ndarray, steps: int) -> np.ndarray:
    """A sample for each label."""
    of = arm.program.specs
    specs = {"params": of.specs, "state": of.model_specs}  # whole: samplers know no ZeRO
    e = arm.experiment
    return draw_images(
        e, state.variables, specs, labels_B.tolist(), arm.mesh, steps=steps, guidance=GUIDANCE
    )


def samples(arm: Arm, judged: judge.Judge, count: int, steps: int) -> Samples:
    """Samples of the trained arm and what the judge says of them."""
    labels_B = asked(judged.classes, count)
    images = sampled(arm, arm.trained, labels_B, steps)
    train, held = judge.whole(arm.data.train)[0], judge.whole(arm.data.val)[0]
    features, read_B = judged.read(images)
    near_B, gap_B = judge.nearest(images[:SHOWN], train)
    return Samples(
        images[:SHOWN].astype(np.float32),
        labels_B,
        float((read_B == labels_B).mean()),
        judge.frechet(features, judged.read(train)[0]),
        near_B,
        gap_B,
        float(judge.nearest(held, train)[1].mean()),
    )


def floor(arm: Arm, judged: judge.Judge) -> Floor:
    """The same of held-out images in place of samples."""
    held, labels_B = judge.whole(arm.data.val)
    features, read_B = judged.read(held)
    train = judged.read(judge.whole(arm.data.train)[0])[0]
    return Floor(float((read_B == labels_B).mean()), judge.frechet(features, train))


@dataclass(frozen=True)
class Watch:
    """The hook that draws one sample of each class while training."""

    classes: int
    steps: int

    def __call__(self, arm: Arm, step: int, state: TrainState) -> Mapping[str, Any]:
        """The samples as bytes, 0..255."""
        images = sampled(arm, state, asked(self.classes, self.classes), self.steps)
        return {"hook/images": np.clip((images + 1) * 127.5, 0, 255).astype(np.int32)}
