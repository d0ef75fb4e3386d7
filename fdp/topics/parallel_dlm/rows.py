"""From measurements to rows of the report: the claims of topic 1."""

from collections.abc import Mapping

import numpy as np

from fdp.price import inference, network
from fdp.study.claims import unigram_entropy
from fdp.study.grid import Grid
from fdp.study.report import Row
from fdp.topics.parallel_dlm import estimators, settings, switching
from fdp.topics.parallel_dlm.head import ROWS, V_WIDE, HeadSaving, SamplingBytes
from fdp.topics.parallel_dlm.policies import PolicyResult
from fdp.topics.parallel_dlm.switching_run import SwitchedRun

Task = tuple[str, int]  # arm and denoising steps


def indivisible_heads(heads: int, kv_heads: int, devices: int) -> Row:
    """What a model whose heads cannot be shared by every device leaves open."""
    claim = "a degree for each phase beats the best fixed degree; switching changes no sample"
    note = (
        f"heads % tp = {heads} % {devices} and kv_heads % tp = {kv_heads} % {devices} must both be "
        f"0: set model.heads and model.kv_heads to multiples of {devices}"
    )
    return Row.untestable(claim, "speed-up, ids", "", "value >= 1.1", "simulated", note)


def head(found: HeadSaving) -> list[Row]:
    """FLOPs and loss of the masked-rows head; bytes and memory of the step beside them."""
    claim, metric = "the masked-rows head halves the head's FLOPs", "head FLOPs per device and step"
    note = (
        "matmuls in the jaxpr of loss and gradients; exact-k masks, static capacity, no row "
        "dropped. The step sends {:,.0f} bytes a device against {:,.0f}; the compiled step's "
        "temporary memory is {:,} bytes against {:,}"
    ).format(*found.sent, *found.temporary)
    value, base = found.masked_rows, ("t-form: head on every row", found.every_row)
    args = claim, metric, value, "FLOP", "ratio <= 0.55", "counted", *base
    error = "… at equal loss", "relative change of the loss", found.loss_error
    same = "same parameters, tokens and masks; baseline: head on every row"
    return [
        Row.judged(*args, note=note, decides=True),
        Row.judged(*error, "", "<= 1e-5", "measured", note=same),
    ]


def variance(name: str, scatters: list[estimators.Scatter]) -> list[Row]:
    """Variance of the loss of one batch over noise draws, and the test that the two estimators have
    one mean.
    """
    by_name = {e: [s.variance(e) for s in scatters] for e in estimators.ESTIMATORS}
    baseline, method = by_name[estimators.BASELINE], by_name[estimators.METHOD]
    draws = len(scatters[0].losses[estimators.METHOD])
    variances = ", ".join(f"{n} {np.mean(v):.3g}" for n, v in by_name.items())
    claim = f"{name}: antithetic exact-k losses scatter less"
    metric = "variance of the iid-t loss over that of exact-k"
    ratios = [b / m for b, m in zip(baseline, method, strict=True)]
    note = f"{draws} noise draws on one validation batch for each seed, trained parameters; "
    note += f"variances in nats²/token²: {variances}"
    z = abs(estimators.z_score(scatters))
    bias = f"{name}: … without bias", "|z| of the difference of the means", z
    seeds = f"{draws} draws × {len(scatters)} seed(s)"
    return [
        Row.judged(claim, metric, ratios, "", "value >= 5", "measured", note=note, decides=True),
        Row.judged(*bias, "", "<= 3", "measured", note=seeds),
    ]


def sampling_bytes(found: list[SamplingBytes]) -> Row:
    """Bytes of distributed Gumbel-max with confidence against gathered logits."""
    claim, metric = "sampling sends ids and scalars, not logits", "bytes of gathered logits over"
    worst = min(x.gather / x.scalars for x in found)
    note = f"compiled HLO, token and confidence of {ROWS} rows of {V_WIDE:,} ids over tp: "
    note += "; ".join(f"tp{x.tp} {x.scalars:,.0f} against {x.gather:,.0f}" for x in found)
    metric += " bytes sent"
    return Row.judged(claim, metric, worst, "", "value >= 1000", "counted", note=note)


def equal_ids(drawn: dict[int, np.ndarray]) -> Row:
    """Ids by tp degree."""
    first = next(iter(drawn.values()))
    different = sum(int((ids != first).sum()) for ids in drawn.values())
    claim, metric = "samples do not depend on the tp degree", "ids that differ from one device's"
    note = f"{first.size} tokens, first-hitting, tp = {', '.join(map(str, drawn))}, same parameters"
    return Row.judged(claim, metric, different, "", "== 0", "measured", note=note)


# Selective sums
# -------------------------------------------------------------------------------------------------


def selective(results: Mapping[Task, list[PolicyResult]], sequence_parallel: float) -> list[Row]:
    """Bytes, KL, NLL of the headline policies, and K-refresh at no fewer bytes.

    `sequence_parallel`: bytes of TP with sequence parallelism, as a share of its all-reduces."""
    by_name = {task: {r.policy: r for r in found} for task, found in results.items()}
    shares = {task: found[settings.HEADLINE].share for task, found in by_name.items()}
    claim = "selective sums send at most 35 % of Megatron-TP's forward bytes"
    metric, most = "share of the exact bytes, largest", max(shares.values())
    note = (
        "jaxpr of the bfloat16 program at tp = 8, selection scalars and the first, full step "
        f"included; exact TP with sequence parallelism: {sequence_parallel:.3f}; "
    ) + "; ".join(f"{name}, N={n}: {share:.3f}" for (name, n), share in shares.items())
    args = claim, metric, most, "", "value <= 0.35", "counted"
    rows = [Row.judged(*args, note=note, decides=True)]
    for (name, steps), found in by_name.items():
        rows += _one_task(name, f"{name}, N={steps}", found)
    return rows


def _one_task(name: str, label: str, found: dict[str, PolicyResult]) -> list[Row]:
    mine, exact = found[settings.HEADLINE], found[settings.EXACT]
    stale, every = found[settings.REFRESH], found.get(settings.EVERY_ROW)
    kl, nats = "KL(exact ‖ selective), ", ("nats", "value <= 1e-3", "measured")
    note = f"policy '{mine.policy}' at {mine.share:.3f} of the bytes; top-1 "
    note += f"{np.mean(mine.agree_read):.4f}"
    first = f"{label}: selective sums keep what is sampled from", f"{kl}rows read", mine.kl_read
    rows = [Row.judged(*first, *nats, note=note, decides=True)]

    entropies = [np.mean([unigram_entropy(ids) for ids in r.ids]) for r in (mine, exact)]
    nlls = [float(np.mean(r.nll)) for r in (mine, exact)]
    judge = "exact law" if name == "markov" else "judged by the AR arm"
    note = (
        f"nats/token {nlls[0]:.4f} against {nlls[1]:.4f} ({judge}); unigram entropy "
        f"{entropies[0]:.3f} against {entropies[1]:.3f} nats; {len(mine.ids)} seed(s) × "
        f"{len(mine.ids[0])} sequences, same noise"
    )
    claim, metric = f"{label}: … and the likelihood of samples", "|ln(NLL / NLL of exact)|, means "
    value, metric = abs(float(np.log(nlls[0] / nlls[1]))), metric + "over seeds"
    rows += [Row.judged(claim, metric, value, "", "value <= 0.01", "measured", note=note)]

    ratios = [s / max(m, 1e-12) for s, m in zip(stale.kl_read, mine.kl_read, strict=True)]
    note = f"'{stale.policy}' at {stale.share:.3f} of the bytes: KL {np.mean(stale.kl_read):.3g} "
    claim = f"{label}: … far better than refreshing every K steps"
    args = claim, "KL of K-refresh over KL of selective sums", ratios, "", "value >= 3", "measured"
    rows += [Row.judged(*args, note=note + "nats")]
    if every:
        note = f"policy '{every.policy}' at {every.share:.3f} of the bytes, for orders that see "
        claim = f"{label}: … also on masked rows that are not read"
        args = claim, f"{kl}all masked rows", every.kl_masked, *nats
        rows += [Row.judged(*args, note=note + "all rows")]
    return rows


# Switching
# -------------------------------------------------------------------------------------------------


def region(found: Grid) -> list[Row]:
    """Gain over the best fixed degrees: of the typical job, and of the best one."""
    at, job = found.at(**found.best()), switching.best_job(found)
    chosen, fits = switching.plan(job), int(np.isfinite(found.fields["value"]).sum())
    errors = inference.matmul_error("h100"), network.held_out_error("h100", small=False)
    requests, steps = found.axes["requests"], found.axes["reuse steps a refresh"]
    note = (
        f"{fits} jobs: {requests} requests × {steps} reuse steps per refresh × "
        f"{found.axes['positions']} tokens; ≥ 1.1 in {found.share('value >= 1.1'):.1%} of them; 8B "
        "shape on 8 × H100, no overlap of compute and network; held-out error of the parts: "
        f"matmuls median {errors[0][0]:.1%}, collectives {errors[1][0]:.1%} (p90 {errors[0][1]:.1%}"
        f", {errors[1][1]:.1%}); intervals propagate it"
    )
    claim, metric = "a degree for each phase beats the best fixed degree", "speed-up of the median "
    median = float(np.nanmedian(found.fields["value"]))
    rule = "", "value >= 1.1", "simulated"
    rows = [Row.judged(claim, metric + "job of the grid", median, *rule, note=note, decides=True)]
    best, fixed = chosen.best, chosen.fixed
    note = (
        f"{job.requests} requests of {job.length}, {job.reuse_steps} reuse steps: {best} "
        f"{1e3 * best.seconds:.1f} ms a period, of which {1e3 * best.switch_seconds:.1f} switching,"
        f" against fixed {fixed} {1e3 * fixed.seconds:.1f} ms"
    )
    args = "… in the best job of the grid", "speed-up, switching included", float(at["value"])
    ci = float(at["low"]), float(at["high"])
    return [*rows, Row.judged(*args, *rule, ci=ci, note=note)]


def switched(runs: tuple[SwitchedRun, SwitchedRun]) -> Row:
    """Ids of the (fixed, switched) run."""
    fixed, moved = runs
    different = int((fixed.ids != moved.ids).sum())
    note = (
        f"{moved.ids.size} tokens, refresh on dp4·tp2, reuse on dp1·tp8; {moved.moves} moves of "
        f"the cache at {moved.counted_bytes:,.0f} bytes a device (formula "
        f"{moved.formula_bytes:,.0f}); programs compiled {max(moved.compilations.values())} time(s)"
    )
    claim, metric = "switching changes no sample", "ids that differ from the fixed degree's"
    return Row.judged(claim, metric, different, "", "== 0", "measured", note=note)
