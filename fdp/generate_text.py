"""Text from a trained arm, plain or speculative: a half of the command `fdp.generate`.

Legend: B samples, L positions."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec

from fdp import process, sharding
from fdp.arm import Arm
from fdp.collectives import shard_map
from fdp.data.tokenizer import Tokenizer
from fdp.experiment import Experiment
from fdp.keys import UserError, closest
from fdp.mesh import BATCH_AXES
from fdp.objectives import Autoregressive, BlockDiffusion, SEDDUniform, TokenObjective
from fdp.parallel.tensor import suppress
from fdp.sampling import block_cache
from fdp.sampling.block_cache import BlockCache, cacheable
from fdp.sampling.chain import ORDERS
from fdp.sampling.draw import chain_of, denoiser_of, generation_mesh, sampled
from fdp.sampling.noise import Draw, gumbel
from fdp.sampling.speculative import Drafter, JacobiDrafter, ModelDrafter, StaleDrafter, speculate
from fdp.trained import TrainedArm, restored

P = PartitionSpec
FLAGS = ("prompt", "temperature", "order", "length", "speculate", "check")
COUNT = 1
MOST = 4096  # texts of one call
HOTTEST = 100.0
WINDOW = 8
AROUND = 16  # ids to either side of one that differs
FIRST_HITTING = "first_hitting"
FREE: dict[str, Drafter] = {
    "stale": StaleDrafter(),
    "jacobi": JacobiDrafter(),
}  # drafters that need no other model
COUNTED = ("nfe", "states", "passes", "judged", "accepted", "bad")


def declare(values: flags.FlagValues) -> None:
    """The flags of text."""
    word, number = flags.DEFINE_string, flags.DEFINE_integer
    orders = ", ".join(name for name in ORDERS if name != "random")
    word("prompt", "", "the start of every text", flag_values=values)
    note = "0: the likeliest token each time; 1: a draw of the model's law"
    flags.DEFINE_float("temperature", 1.0, note, flag_values=values)
    note = f"in which masks are revealed: {FIRST_HITTING} (the model's law), {orders}"
    word("order", FIRST_HITTING, note, flag_values=values)
    note = "tokens of prompt and text; default those of a training sequence"
    number("length", None, note, flag_values=values)
    note = f"none, stale, jacobi or draft=ARM; with ,window={WINDOW} for the states of a round"
    word("speculate", "none", note, flag_values=values)
    note = "with --speculate: write without it too, and fail where an id differs"
    flags.DEFINE_boolean("check", False, note, flag_values=values)


class Speculation(NamedTuple):
    """Who drafts (one of FREE, or "draft": another arm), and the states of a window."""

    drafter: str
    window: int
    arm: str | None = None

    @classmethod
    def read(cls, text: str) -> "Speculation | None":
        """From words such as jacobi,window=16. Raises UserError for others."""
        first, *more = text.split(",")
        name, _, arm = first.partition("=")
        known = ("none", *FREE, "draft")
        if name not in known:
            raise UserError(f"--speculate={text}: {name!r} is unknown: {closest(name, known)}")
        if (name == "draft") != bool(arm):
            fix = "draft=ARM, such as draft=small-s0" if name == "draft" else name
            raise UserError(f"--speculate={text}: write {fix}")
        window = str(WINDOW)
        for one in more:
            key, _, window = one.partition("=")
            if key != "window" or name == "none" or len(more) > 1:
                raise UserError(f"--speculate={text}: write it as jacobi,window={WINDOW}")
        if not window.isdecimal() or int(window) < 1:
            raise UserError(
                f"--speculate={text}: a window of {window!r} states: it holds the current one, so "
                "set window=1 or more"
            )
        return None if name == "none" else cls(name, int(window), arm or None)


def check(f: flags.FlagValues) -> None:
    """Flags whose allowed values no run decides. Raises UserError with the fix."""
    if f.order != FIRST_HITTING and f.order not in ORDERS:
        known = (FIRST_HITTING, *ORDERS)
        raise UserError(f"--order={f.order} is unknown: {closest(f.order, known)}")
    if not 0 <= f.temperature <= HOTTEST:
        raise UserError(f"--temperature={f.temperature} must be within 0..{HOTTEST:g}")
    if Speculation.read(f.speculate) is None and f.check:
        raise UserError("--check compares with the verifier alone: give --speculate=jacobi, too")


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be written, by whom. start_L: prompt ids, then masks. `draft`: who drafts, where
    another arm does."""

    trained: TrainedArm
    start_L: np.ndarray
    count: int
    seed: int
    temperature: float
    order: str
    plan: Speculation | None
    draft: TrainedArm | None
    check: bool

    @classmethod
    def of(
        cls, trained: TrainedArm, c: ml_collections.ConfigDict, workdir: Path, f: flags.FlagValues
    ) -> "Asked":
        """From the flags. Raises UserError for what the arm cannot do."""
        count, arm, plan = COUNT if f.n is None else f.n, trained.arm, Speculation.read(f.speculate)
        if not 1 <= count <= MOST:
            raise UserError(f"--n={count} must be within 1..{MOST}")
        if f.order != FIRST_HITTING and isinstance(arm.objective, Autoregressive | SEDDUniform):
            raise UserError(
                f"--order={f.order} is for masked models, and arm {arm.label} is of objective "
                f"{type(arm.objective).__name__}: leave it out"
            )
        if plan and isinstance(arm.objective, SEDDUniform):
            raise UserError(
                f"--speculate={f.speculate}: arm {arm.label} is of objective SEDDUniform, which "
                "has no chain: its steps change tokens that stand already; leave it out"
            )
        ids = prompt_ids(f.prompt, arm)
        length = length_of(f.length, arm.experiment)
        _check_prompt(ids, length, arm)
        mask = np.full(length - len(ids), arm.objective.n_ids)
        start_L = np.concatenate([ids, mask]).astype(np.int32)
        if plan:
            plan = _cut(plan, len(mask), arm, length)
        draft = restored(c, workdir, plan.arm) if plan and plan.arm else None
        if draft:
            refuse_draft(arm.experiment, draft.arm.experiment, length)
        order = "random" if f.order == FIRST_HITTING else f.order
        wanted = f.seed, f.temperature, order
        return cls(trained, start_L, count, *wanted, plan, draft, f.check)


def _cut(plan: Speculation, steps: int, arm: Arm, length: int) -> Speculation:
    """The plan with no more states than steps are left, said where it changes."""
    most, why = steps, f"{length} - {length - steps} steps are left after the prompt"
    objective = arm.objective
    # Drafts of another arm need all rows, so their windows may cross the border of a block.
    blocks = isinstance(objective, BlockDiffusion) and not plan.arm
    if blocks and objective.block < most:
        most, why = objective.block, f"a block has {objective.block} steps"
    if plan.window <= most:
        return plan
    warnings.warn(f"window={plan.window} is cut to {most}: {why}", stacklevel=3)
    return plan._replace(window=most)


def prompt_ids(text: str, arm: Arm) -> np.ndarray:
    """int32 [tokens] of a prompt. Raises UserError for one that is no text of the arm's data."""
    n_ids = arm.objective.n_ids
    try:
        found = _tokenizer(arm).encode(text) if text else np.zeros(0, np.int32)
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"--prompt is not what arm {arm.label} reads: {' '.join(str(error).split())[:80]}"
        ) from error
    wrong = found[(found < 0) | (found >= n_ids)]
    if wrong.size:
        what = "the mask" if wrong[0] == n_ids else f"id {wrong[0]}"
        raise UserError(
            f"--prompt holds {what}, and arm {arm.label} reads ids of 0 to {n_ids - 1} (mask "
            f"{n_ids}): leave it out"
        )
    return found


def length_of(asked: int | None, e: Experiment) -> int:
    """Tokens of a text. Raises UserError for a length that the model has not learnt."""
    trained = e.data.seq_len
    if asked is None:
        return trained
    if isinstance(e.objective, BlockDiffusion) and asked != trained:
        raise UserError(
            f"--length={asked}: the mask of block diffusion is that of {trained} tokens: leave it "
            "out"
        )
    if not 1 <= asked <= trained:
        raise UserError(
            f"--length={asked} must be within 1..{trained}, what the run was trained on"
        )
    return asked


def _check_prompt(ids: np.ndarray, length: int, arm: Arm) -> None:
    n, objective = len(ids), arm.objective
    if n >= length:
        raise UserError(
            f"--prompt has {n} tokens of a text of {length}, which leaves {length - n}: shorten it "
            f"to {length - 1}"
        )
    if n and isinstance(objective, SEDDUniform):
        raise UserError(
            f"--prompt: the sampler of arm {arm.label} (objective SEDDUniform) changes every "
            "token: leave it out, or name another arm"
        )
    if isinstance(objective, BlockDiffusion) and n % objective.block:
        block, rest = objective.block, n % objective.block
        whole = [x for x in (n - rest, n - rest + block) if 0 < x < length]
        raise UserError(
            f"--prompt has {n} tokens, which are not whole blocks of {block}: {n} mod {block} = "
            f"{rest}; give {' or '.join(map(str, whole)) or 'none'}"
        )


def refuse_draft(verifier: Experiment, draft: Experiment, length: int) -> None:
    """Raises UserError for a draft model whose states are not the verifier's."""
    both = [_shape_of_states(e) for e in (verifier, draft)]
    for what, mine, theirs in zip(both[0], both[0].values(), both[1].values(), strict=True):
        if mine != theirs:
            raise UserError(
                f"the verifier has {what} {mine} and the draft has {theirs}: name a draft with "
                "that of the verifier"
            )
    if draft.data.seq_len < length:
        raise UserError(
            f"the draft was trained on {draft.data.seq_len} tokens, and a text has {length}: set "
            f"--length={draft.data.seq_len} or less"
        )


def _shape_of_states(e: Experiment) -> dict[str, Any]:
    objective: Any = e.objective
    tokenizer = e.data.tokenizer
    causal = isinstance(objective, Autoregressive)
    kind = "left to right" if causal else "masked"
    kind = "uniform" if isinstance(objective, SEDDUniform) else kind
    return {
        "objectives that are": kind,
        "mask id": objective.n_ids,
        "block size": getattr(objective, "block", None),
        "vocabulary": getattr(tokenizer, "fingerprint", None),
    }


def _tokenizer(arm: Arm) -> Tokenizer:
    tokenizer = arm.data.tokenizer
    assert tokenizer is not None, "data of ids have a tokenizer"
    return tokenizer


class Written(NamedTuple):
    """ids int32 [B, L]; info as of `speculate`, or "nfe" alone; seconds of the run, compilation
    apart."""

    ids_BxL: np.ndarray
    info: dict[str, np.ndarray]
    seconds: float


class TextWriter:
    """The whole generation as one compiled program for all prompts of a length of text; for block
    diffusion, which writes with a cache of finished blocks where no other model drafts, one for
    each number of blocks of a prompt. `mesh`: whose devices write, by default that of the arm."""

    def __init__(self, asked: Asked, plan: Speculation | None, mesh: Any = None):
        self.asked, self.plan = asked, plan
        self.mesh = generation_mesh(mesh or asked.trained.arm.mesh)
        both = [asked.trained, *([asked.draft] if plan and asked.draft else [])]
        specs = [one.arm.program.specs.variable_specs() for one in both]
        self._variables = [
            process.place(one.variables, sharding.shardings(self.mesh, spec))
            for one, spec in zip(both, specs, strict=True)
        ]
        e = asked.trained.arm.experiment
        blocks = isinstance(e.objective, BlockDiffusion) and cacheable(e.model)
        self.cached = blocks and not (plan and asked.draft)
        self._names = (*(COUNTED if plan else ("nfe",)), *(("fills",) if self.cached else ()))
        rows = P(BATCH_AXES)
        counts = dict.fromkeys(self._names, P()) | ({"rounds": rows} if plan else {})
        given = specs, P(), rows, rows
        write = shard_map(self._write, self.mesh, given, (rows, counts))
        self._program = jax.jit(write)
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, start_L: np.ndarray, seed: int) -> Written:
        """Texts that begin as `start_L`."""
        ways = self.mesh.shape["dp"]
        ids_B = jnp.arange(-(-self.asked.count // ways) * ways)
        start_BxL = np.broadcast_to(start_L, (len(ids_B), len(start_L)))
        if self.cached:  # the prompt alone: all else begins masked
            mask_id = self.asked.trained.arm.objective.n_ids
            start_BxL = start_BxL[:, : int((start_L != mask_id).sum())]
        args = self._variables, jax.random.key(seed), ids_B, start_BxL
        if start_BxL.shape not in self._compiled:
            self._compiled[start_BxL.shape] = self._program.lower(*args).compile()
        began = time.monotonic()
        ids_BxL, info = jax.block_until_ready(self._compiled[start_BxL.shape](*args))
        seconds = time.monotonic() - began
        info = {name: process.fetch(x) for name, x in info.items()}
        return Written(process.fetch(ids_BxL)[: self.asked.count], info, seconds)

    def _write(self, variables: Any, key: Any, ids_B: Any, start_BxL: Any) -> tuple[Any, Any]:
        asked, e = self.asked, self.asked.trained.arm.experiment
        assert isinstance(e.objective, TokenObjective)
        length, temperature = len(asked.start_L), asked.temperature
        names = (*self._names, "rounds") if self.plan else self._names
        if self.cached:
            assert cacheable(e.model)
            draw = Draw(key, ids_B, length, e.objective.n_ids, temperature)
            ids_BxL, info = block_cache.sample(
                BlockCache(e.model),
                variables[0],
                chain_of(e, draw, asked.order),
                self._drafter(()) if self.plan else None,
                window=self.plan.window if self.plan else 1,
                prompt_BxP=start_BxL if start_BxL.shape[1] else None,
            )
            return ids_BxL, {name: info[name] for name in names}
        draw = Draw(key, ids_B, length, e.objective.n_ids, temperature, start_BxL)
        if self.plan is None:
            ids_BxL, info = sampled(e, variables[0], draw, asked.order)
        else:
            chain, denoise = chain_of(e, draw, asked.order), denoiser_of(e, variables[0])
            drafter = self._drafter(variables[1:])
            ids_BxL, info = speculate(chain, denoise, drafter, window=self.plan.window)
        return ids_BxL, {name: info[name] for name in names}

    def _drafter(self, variables: Any) -> Drafter:
        assert self.plan is not None
        if self.asked.draft is None:
            return FREE[self.plan.drafter]
        model = ModelDrafter(denoiser_of(self.asked.draft.arm.experiment, variables[0]))
        return JacobiDrafter(model)  # usually fewer rounds than the model alone


def write(asked: Asked) -> tuple[list[str], int]:
    """(lines to print, exit status: 1 where a check fails)."""
    written = TextWriter(asked, asked.plan)(asked.start_L, asked.seed)
    tokenizer = _tokenizer(asked.trained.arm)
    lines = [f"text {i:<4} {tokenizer.decode(row)}" for i, row in enumerate(written.ids_BxL)]
    lines += table(asked, written)
    if not asked.check:
        return lines, 0
    alone = TextWriter(asked, None)(asked.start_L, asked.seed)
    found = differences(asked, written.ids_BxL, alone.ids_BxL)
    return lines + found, int(len(found) > 1)


def table(asked: Asked, written: Written) -> list[str]:
    """What the texts took."""
    info, steps = written.info, int((asked.start_L == asked.trained.arm.objective.n_ids).sum())
    each = written.seconds / asked.count
    last = [f"time      {each:.3g} s a text, compilation apart"]
    if "fills" in info:
        last.insert(0, f"cache     {info['fills']} passes over finished blocks")
    if asked.plan is None:
        return [f"verifier  {info['nfe']} calls", *last]
    rounds = info["rounds"][: asked.count]
    judged, accepted = info["judged"].sum(), info["accepted"].sum()
    share = f"{accepted / judged:.0%}" if judged else "none"
    bad = np.flatnonzero(info["bad"])
    if asked.draft and bad.size:
        others = f" and {bad.size - 1} others" if bad.size > 1 else ""
        warnings.warn(
            f"arm {asked.draft.arm.label} gave numbers that are not finite in step {bad[0]}{others}"
            ": its drafts of these count as rejected, and the text is the verifier's",
            stacklevel=2,
        )
    return [
        f"rounds    {rounds.mean():.2f} a text ({rounds.min()} to {rounds.max()}), {steps} steps",
        f"verifier  {info['nfe']} calls, {info['states']} states judged",
        f"accepted  {share} of {judged} drafted steps",
        f"drafts    {info['passes']} passes of a draft model",
        *last,
    ]


def differences(asked: Asked, ids_BxL: np.ndarray, alone_BxL: np.ndarray) -> list[str]:
    """One line where the ids are those of the verifier alone, else also both texts around the id
    that its chain is the first to reveal otherwise, and what decided it."""
    wrong = np.argwhere(ids_BxL != alone_BxL)
    new = len(ids_BxL) * int((asked.start_L == asked.trained.arm.objective.n_ids).sum())
    said = f"check     {len(wrong)} of {new} ids differ from those of the verifier alone"
    if not len(wrong):
        return [said]
    states = _states_alone(asked, len(ids_BxL))
    mask_id = asked.trained.arm.objective.n_ids
    steps = [int((states[:, b, i] == mask_id).sum()) for b, i in wrong]
    step, (b, i) = min(zip(steps, wrong.tolist(), strict=True))
    state_L, step = states[step - 1, b], step - 1
    id_, alone = int(ids_BxL[b, i]), int(alone_BxL[b, i])
    scores_V = _scores(asked, b, i, step, state_L)
    shown = _tokenizer(asked.trained.arm).decode
    around = slice(max(i - AROUND, 0), i + AROUND + 1)
    return [
        said,
        f"first     text {b}, position {i}, step {step}: id {id_}, alone {alone}; margin of the "
        f"latter {scores_V[alone] - scores_V[id_]:.2g}",
        f"before    {shown(state_L[around])}",
        f"drafted   {shown(ids_BxL[b, around])}",
        f"alone     {shown(alone_BxL[b, around])}",
    ]


def _states_alone(asked: Asked, count: int) -> np.ndarray:
    """The verifier's states before the first step and after each, int32 [steps + 1, B, L]."""
    e, start_BxL = (
        asked.trained.arm.experiment,
        np.broadcast_to(asked.start_L, (count, len(asked.start_L))),
    )

    @jax.jit
    def every(variables: Any) -> jax.Array:
        return sampled(e, variables, _draw(asked, jnp.arange(count), start_BxL, True), asked.order)[
            1
        ]["trace"]

    return np.asarray(every(asked.trained.variables))


def _scores(asked: Asked, b: int, i: int, step: int, state_L: np.ndarray) -> np.ndarray:
    """What the verifier's step takes the largest of at position `i` of sample `b`: f32 [V]."""
    e = asked.trained.arm.experiment

    @jax.jit
    def every(variables: Any) -> jax.Array:
        chain = chain_of(e, _draw(asked, jnp.array([b]), state_L[None]), asked.order)
        state = chain.begin()._replace(step_B=jnp.array([step]))
        logits = suppress(
            denoiser_of(e, variables)(state.z_BxL, chain.level(state)), chain.draw.n_ids
        )[0, i]
        if asked.temperature == 0:
            return logits
        return logits / asked.temperature + gumbel(chain.keys(state)[0, i], len(logits))

    return np.asarray(every(asked.trained.variables))


def _draw(asked: Asked, ids_B: Any, start_BxL: Any, trace: bool = False) -> Draw:
    n_ids, key = asked.trained.arm.objective.n_ids, jax.random.key(asked.seed)
    return Draw(key, ids_B, start_BxL.shape[1], n_ids, asked.temperature, start_BxL, trace)
