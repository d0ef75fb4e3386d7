"""The pictures of topic 1: training curves, wire bytes by mesh, bytes against KL, a sample while it
is denoised.

Legend: L positions, T states.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.models import module
from fdp.sampling.masked import first_hitting
from fdp.study.figures import figure, save, training_curves
from fdp.topics.parallel_dlm.checks import Comparison
from fdp.topics.parallel_dlm.pareto import Outcome

ARMS = {"mdlm": "MDLM (NELBO)", "ar": "AR (NLL)", "markov": "MDLM on the Markov chain (NELBO)"}


def curves(workdir: Path) -> str:
    """Loss against steps, mean over seeds. Returns the path inside the workdir."""
    fig = training_curves(workdir, ARMS, "Masked diffusion and autoregressive LM, equal budget")
    return str(save(fig, workdir / "plots" / "loss.png").relative_to(workdir))


def traffic(workdir: Path, comparisons: list[Comparison]) -> str:
    """Stacked wire bytes per device and step of every mesh, by collective and axes. Returns the
    path in the workdir.
    """
    fig, axes = figure(width=8.0, height=4.0)
    names = [c.name.replace(", ", "\n") for c in comparisons]
    base = np.zeros(len(names))
    kinds = sorted({key for c in comparisons for key in c.counted}, key=str)
    for i, (op, mesh_axes) in enumerate(kinds):
        height = np.array([c.counted.get((op, mesh_axes), 0.0) for c in comparisons]) / 1024
        hatch = ("", "//", "..")[i // 7 % 3]  # the house style has seven colours
        axes.bar(
            names,
            height,
            bottom=base,
            label=f"{op} over {'·'.join(mesh_axes)}",
            hatch=hatch,
            width=0.6,
        )
        base += height
    axes.set_ylim(0, 1.05 * base.max())
    axes.set(
        ylabel="KiB sent per device and step",
        title="Wire bytes of loss and gradients, counted in the HLO",
    )
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return str(save(fig, workdir / "plots" / "bytes.png").relative_to(workdir))


def pareto(workdir: Path, outcomes: Mapping[tuple[str, int], list[Outcome]]) -> str:
    """KL on the rows read against the share of bytes sent, one panel a task. Returns the path in
    the workdir.
    """
    fig, panels = figure(columns=len(outcomes), width=3.6, height=4.0)
    # "drift 0.4" and "drift 0.25" are one line, "drift, int8" another.
    kind_of = lambda o: (
        "drift, int8" if "drift, int8" in o.policy else o.policy.split(",")[0].split(" ")[0]
    )
    kinds = sorted({kind_of(o) for found in outcomes.values() for o in found})
    for axes, ((name, steps), found) in zip(np.atleast_1d(panels), outcomes.items(), strict=True):
        for i, kind in enumerate(kinds):
            mine = sorted((o for o in found if kind_of(o) == kind), key=lambda o: o.share)
            kl = [max(float(np.mean(o.kl_read)), 1e-7) for o in mine]
            axes.plot(
                [o.share for o in mine],
                kl,
                marker="osD^v*XPh"[i % 9],
                linestyle=":",
                label=kind,
                linewidth=0.8,
            )
        axes.axhline(1e-3, color="#444444", linestyle="--", linewidth=0.8)
        axes.axvline(0.35, color="#444444", linestyle="--", linewidth=0.8)
        axes.set(
            yscale="log",
            xlim=(0, 1.05),
            xlabel="share of the exact bytes over tp",
            title=f"{name}, N = {steps} steps",
        )
    np.atleast_1d(panels)[0].set_ylabel("KL(exact ‖ policy), nats, rows read (1e-7: exact)")
    np.atleast_1d(panels)[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return str(save(fig, workdir / "plots" / "pareto.png").relative_to(workdir))


def film_strip(workdir: Path, arm: Arm, frames: int = 6) -> str:
    """One sample while it is denoised: tokens in reading order, coloured by the step that revealed
    them.
    """
    states_TxL, mask_id = trace(arm), arm.objective.n_ids
    length = states_TxL.shape[1]
    assert arm.data.tokenizer is not None
    decode = arm.data.tokenizer.decode
    columns = max(4, round(math.sqrt(length) / 2))
    born_L = (states_TxL == mask_id).sum(0) - 1  # the step after which the token was there
    fig, panels = figure(columns=frames, width=2.1, height=3.4)
    for axes, t in zip(panels, np.linspace(0, length, frames).round().astype(int), strict=True):
        shown = np.where(states_TxL[t] == mask_id, np.nan, born_L).astype(float)
        grid = np.pad(shown, (0, -length % columns), constant_values=np.nan).reshape(-1, columns)
        axes.imshow(grid, cmap="viridis", vmin=0, vmax=length, aspect="auto", alpha=0.45)
        for i, token in enumerate(states_TxL[t]):
            if token != mask_id:
                text = printable(decode([token]))
                axes.text(
                    i % columns, i // columns, text[:7], fontsize=4.5, ha="center", va="center"
                )
        axes.set(title=f"step {t}", xticks=[], yticks=[])
        axes.grid(False)
    return str(save(fig, workdir / "plots" / "film_strip.png").relative_to(workdir))


def printable(text: str) -> str:
    """The text as matplotlib can draw it: no control characters, no formulas."""
    shown = "".join("⏎" if x == "\n" else x if x.isprintable() else "·" for x in text)
    return shown.replace("$", r"\$")


def trace(arm: Arm) -> np.ndarray:
    """Every state of one first-hitting sample on one device: int32 [L + 1, L]."""
    key, length, n_ids = jax.random.key(arm.seed), arm.data.seq_len, arm.objective.n_ids

    @jax.jit
    def run(params: Any) -> jax.Array:
        def denoise(z: jax.Array, noise_B: jax.Array) -> Any:
            noised = {"inputs": z, "noise": noise_B}
            return module.run(arm.model, {"params": params}, noised)[0]

        return first_hitting(denoise, key, jnp.arange(1), length, n_ids=n_ids, trace=True)[1][
            "trace"
        ]

    return np.asarray(run(arm.trained_on_host.params))[:, 0]
