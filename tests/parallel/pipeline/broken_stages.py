"""Stages of which one goes wrong in its first B. Imported by processes that tests start: no jax."""

import os
import time
from dataclasses import dataclass
from typing import Any

from fdp.parallel.pipeline.orders import Order


def dies(u: int, k: int, message: Any) -> None:
    os._exit(3)


def hangs(u: int, k: int, message: Any) -> None:
    time.sleep(60)


def fails(u: int, k: int, message: Any) -> None:
    raise FloatingPointError("not a number")


@dataclass(frozen=True)
class Broken:
    """`stage` goes wrong in the way of `how`."""

    stage: int
    how: Any

    def __call__(self, stage: int, order: Order) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys("FBW", lambda u, k, message: b"")
        return found | ({"B": self.how} if stage == self.stage else {})
