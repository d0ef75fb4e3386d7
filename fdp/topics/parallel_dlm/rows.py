"""From measurements to rows of the report: the claims of topic 1 on estimators, ids on the wire and
selective sums.

Legend: L positions, N denoising steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdp.arm import Arm
from fdp.data.batches import batch
from fdp.data.synthetic import MarkovChain
from fdp.price import inference
from fdp.study.report import Row
from fdp.topics.parallel_dlm import (
    checks,
    estimators,
    pareto,
    settings,
    switching_region,
    switching_run,
)

Task = tuple[str, int]  # arm and denoising steps


def too_few_devices() -> Row:
    """What one device cannot decide."""
    return Row.untestable(
        "sharded equals unsharded; what sums over tp may leave out",
        "errors, bytes over tp",
        "",
        "<= 1e-5",
        "measured",
        f"needs {checks.DEVICES} devices: run the cpu variant with JAX_PLATFORMS=cpu",
    )


def indivisible_heads(heads: int, kv_heads: int) -> Row:
    """What a model whose heads cannot be shared by every device leaves open."""
    return Row.untestable(
        "a degree for each phase beats the best fixed degree; switching changes no sample",
        "speed-up, ids",
        "",
        "value >= 1.1",
        "simulated",
        f"heads % tp = {heads} % {checks.DEVICES} and kv_heads % tp = {kv_heads} % "
        f"{checks.DEVICES} must both be 0: "
        f"set model.heads and model.kv_heads to multiples of {checks.DEVICES}",
    )


def equality(comparisons: list[checks.Comparison]) -> list[Row]:
    """Loss, gradients and bytes of the small model on every mesh."""
    loss = max(c.output_error for c in comparisons)
    gradient = max(c.gradient_error for c in comparisons)
    wrong = sum(len(c.mismatches()) for c in comparisons)
    kinds = sum(len(c.formula) for c in comparisons)
    meshes = "float32 model of two layers against one device, on " + "; ".join(
        c.name for c in comparisons
    )
    return [
        Row.judged(
            "sharded loss equals unsharded",
            "largest relative error of the loss",
            loss,
            "",
            "<= 1e-5",
            "measured",
            note=meshes,
        ),
        Row.judged(
            "sharded gradients equal unsharded",
            "largest |Δg|/|g|, whole tree",
            gradient,
            "",
            "<= 1e-5",
            "measured",
            note=meshes,
        ),
        Row.judged(
            "bytes per axis equal the closed formula",
            "(op, axes) entries that differ",
            wrong,
            "",
            "== 0",
            "counted",
            note=f"compiled HLO of loss and gradients against fdp.count.bytes to the byte, {kinds} "
            "entries",
        ),
    ]


def head(arm: Arm) -> list[Row]:
    """FLOPs and loss of the masked-rows head; bytes and memory of the step beside them."""
    saving = checks.head_saving(arm.program, batch(arm.data.train, 0, arm.experiment.fit.batch, 0))
    return [
        Row.judged(
            "the masked-rows head halves the head's FLOPs",
            "head FLOPs per device and step",
            saving.flops,
            "FLOP",
            "ratio <= 0.55",
            "counted",
            "t-form: head on every row",
            saving.full_flops,
            note="matmuls in the jaxpr of loss and gradients; exact-k masks, static capacity, no "
            "row dropped. The step "
            f"sends {saving.masked.sent:,.0f} bytes a device against {saving.whole.sent:,.0f}; the "
            "compiled step's "
            f"temporary memory is {saving.masked.temporary:,} bytes against "
            f"{saving.whole.temporary:,}",
        ),
        Row.judged(
            "… at equal loss",
            "relative change of the loss",
            saving.loss_error,
            "",
            "<= 1e-5",
            "measured",
            note="same parameters, tokens and masks; baseline: head on every row",
        ),
    ]


def variance(name: str, scatters: list[estimators.Scatter]) -> list[Row]:
    """Variance of the loss of one batch over noise draws, and the test that the two estimators have
    one mean.
    """
    column = lambda estimator: [s.variance(estimator) for s in scatters]
    others = ", ".join(f"{n} {np.mean(column(n)):.3g}" for n in list(estimators.ESTIMATORS)[1:-1])
    draws = len(scatters[0].losses[estimators.METHOD])
    baseline, method = column(estimators.BASELINE), column(estimators.METHOD)
    return [
        Row.judged(
            f"{name}: antithetic exact-k losses scatter less",
            "variance of the iid-t loss over that of exact-k",
            [b / m for b, m in zip(baseline, method, strict=True)],
            "",
            "value >= 5",
            "measured",
            note=f"{draws} noise draws on one validation batch for each seed, trained parameters; "
            "variances in "
            f"nats²/token²: iid t {np.mean(baseline):.3g}, antithetic exact k "
            f"{np.mean(method):.3g}; also {others}",
        ),
        Row.judged(
            f"{name}: … without bias",
            "|z| of the difference of the means",
            abs(estimators.z_score(scatters)),
            "",
            "<= 3",
            "measured",
            note=f"{draws} draws × {len(scatters)} seed(s)",
        ),
    ]


def ids_on_the_wire(arm: Arm, count: int, degrees: tuple[int, ...]) -> list[Row]:
    """Bytes of distributed Gumbel-max with confidence against gathered logits; ids by tp degree."""
    costs = [checks.sampling_bytes(tp) for tp in degrees[1:]]
    worst = min(costs, key=lambda x: x.gather / x.scalars)
    drawn = checks.ids_by_degree(arm, count, degrees)
    first = next(iter(drawn.values()))
    different = sum(int((ids != first).sum()) for ids in drawn.values())
    return [
        Row.judged(
            "sampling sends ids and scalars, not logits",
            "bytes of gathered logits over bytes sent",
            worst.gather / worst.scalars,
            "",
            "value >= 1000",
            "counted",
            note=f"compiled HLO, token and confidence of {checks.ROWS} rows of {checks.V_WIDE:,} "
            "ids over tp: "
            + "; ".join(f"tp{x.tp} {x.scalars:,.0f} against {x.gather:,.0f}" for x in costs),
        ),
        Row.judged(
            "samples do not depend on the tp degree",
            "ids that differ from one device's",
            different,
            "",
            "== 0",
            "measured",
            note=f"{first.size} tokens, first-hitting, tp = {', '.join(map(str, drawn))}, same "
            "parameters",
        ),
    ]


def sample_nll(task: str, outcome: pareto.Outcome, judges: list[Arm]) -> list[float]:
    """Mean NLL of the samples of each seed in nats per token: exact for the Markov chain, under the
    AR arm for text.
    """
    if task == "markov":
        return [float(MarkovChain().nll(ids).mean() / ids.shape[1]) for ids in outcome.ids]
    return [checks.likelihood(judge, ids) for judge, ids in zip(judges, outcome.ids, strict=True)]


def unigram_entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the token frequencies in `ids`: a collapsed sampler shows here, not in its
    likelihood.
    """
    counts = np.unique(ids, return_counts=True)[1] / ids.size
    return float(-(counts * np.log(counts)).sum())


def selective(
    outcomes: Mapping[Task, list[pareto.Outcome]],
    nll: Mapping[Any, list[float]],
    sequence_parallel: float,
) -> list[Row]:
    """Bytes, KL, NLL of the headline policies, and K-refresh at no fewer bytes.

    `sequence_parallel`: bytes of TP with sequence parallelism, as a share of its all-reduces.
    """
    heads = {
        task: next(o for o in found if o.policy == settings.HEADLINE)
        for task, found in outcomes.items()
    }
    share = max(o.share for o in heads.values())
    rows = [
        Row.judged(
            "selective sums send at most 35 % of Megatron-TP's forward bytes",
            "share of the exact bytes, largest",
            share,
            "",
            "value <= 0.35",
            "counted",
            note="jaxpr of the bfloat16 program at tp = 8, selection scalars and the first, full "
            "step included; exact "
            f"TP with sequence parallelism: {sequence_parallel:.3f}; "
            + "; ".join(f"{name}, N={n}: {o.share:.3f}" for (name, n), o in heads.items()),
        )
    ]
    for task, found in outcomes.items():
        rows += _one_task(task, {o.policy: o for o in found}, nll)
    return rows


def _one_task(
    task: Task, found: dict[str, pareto.Outcome], nll: Mapping[Any, list[float]]
) -> list[Row]:
    name, label = task[0], f"{task[0]}, N={task[1]}"
    mine, exact = found[settings.HEADLINE], found[settings.EXACT]
    stale = found[settings.REFRESH]
    entropy = lambda o: np.mean([unigram_entropy(ids) for ids in o.ids])
    rows = [
        Row.judged(
            f"{label}: selective sums keep what is sampled from",
            "KL(exact ‖ selective), rows read",
            mine.kl_read,
            "nats",
            "value <= 1e-3",
            "measured",
            note=f"policy '{mine.policy}' at {mine.share:.3f} of the bytes; top-1 "
            f"{np.mean(mine.agree_read):.4f}",
        ),
        Row.judged(
            f"{label}: … and the likelihood of samples",
            "|ln(NLL / NLL of exact)|, means over seeds",
            abs(float(np.log(np.mean(nll[task, mine.policy]) / np.mean(nll[task, exact.policy])))),
            "",
            "value <= 0.01",
            "measured",
            note=f"nats/token {np.mean(nll[task, mine.policy]):.4f} against "
            f"{np.mean(nll[task, exact.policy]):.4f} "
            f"({'exact law' if name == 'markov' else 'judged by the AR arm'}); unigram entropy "
            f"{entropy(mine):.3f} "
            f"against {entropy(exact):.3f} nats; {len(mine.ids)} seed(s) × {len(mine.ids[0])} "
            "sequences, same noise",
        ),
        Row.judged(
            f"{label}: … far better than refreshing every K steps",
            "KL of K-refresh over KL of selective sums",
            [s / max(m, 1e-12) for s, m in zip(stale.kl_read, mine.kl_read, strict=True)],
            "",
            "value >= 3",
            "measured",
            note=f"'{stale.policy}' at {stale.share:.3f} of the bytes: KL "
            f"{np.mean(stale.kl_read):.3g} nats",
        ),
    ]
    if every := found.get(settings.EVERY_ROW):
        rows.append(
            Row.judged(
                f"{label}: … also on masked rows that are not read",
                "KL(exact ‖ selective), all masked rows",
                every.kl_masked,
                "nats",
                "value <= 1e-3",
                "measured",
                note=f"policy '{every.policy}' at {every.share:.3f} of the bytes, for orders that "
                "see all rows",
            )
        )
    return rows


def switching(
    found: switching_region.Region,
    best: Any,
    runs: tuple[switching_run.Execution, switching_run.Execution],
) -> list[Row]:
    """Gain over the best fixed degrees: of the typical job, and of the best one; ids of the switch
    that was run.
    """
    fixed, switched = runs
    choice = found.choices[best]
    where = (
        f"{found.requests[best[1]]} requests of {found.lengths[best[0]]}, "
        f"{found.reuse_steps[best[2]]} reuse steps"
    )
    matmul, network = inference.matmul_error("h100"), inference.network_error("h100", small=False)
    model = (
        "8B shape on 8 × H100, no overlap of compute and network; held-out error of the parts: "
        "matmuls median "
        f"{matmul[0]:.1%}, collectives {network[0]:.1%} (p90 {matmul[1]:.1%}, {network[1]:.1%}); "
        "intervals propagate it"
    )
    plan = lambda p: f"dp{p.refresh.dp}·tp{p.refresh.tp} → dp{p.reuse.dp}·tp{p.reuse.tp}"
    return [
        Row.judged(
            "a degree for each phase beats the best fixed degree",
            "speed-up of the median job of the grid",
            float(np.nanmedian(found.speedup)),
            "",
            "value >= 1.1",
            "simulated",
            note=f"{np.isfinite(found.speedup).sum()} jobs: {found.requests} requests × "
            f"{found.reuse_steps} reuse "
            f"steps per refresh × {found.lengths} tokens; ≥ 1.1 in {found.share():.1%} of them; "
            f"{model}",
        ),
        Row.judged(
            "… in the best job of the grid",
            "speed-up, switching included",
            float(found.speedup[best]),
            "",
            "value >= 1.1",
            "simulated",
            ci=(float(found.low[best]), float(found.high[best])),
            note=f"{where}: {plan(choice.best)} {1e3 * choice.best.seconds:.1f} ms a period, of "
            "which "
            f"{1e3 * choice.best.switch_seconds:.1f} switching, against fixed {plan(choice.fixed)} "
            f"{1e3 * choice.fixed.seconds:.1f} ms",
        ),
        Row.judged(
            "switching changes no sample",
            "ids that differ from the fixed degree's",
            int((fixed.ids != switched.ids).sum()),
            "",
            "== 0",
            "measured",
            note=f"{switched.ids.size} tokens, refresh on dp4·tp2, reuse on dp1·tp8; "
            f"{switched.moves} moves of the "
            f"cache at {switched.counted_bytes:,.0f} bytes a device (formula "
            f"{switched.formula_bytes:,.0f}); "
            f"programs compiled {max(switched.compilations.values())} time(s)",
        ),
    ]
