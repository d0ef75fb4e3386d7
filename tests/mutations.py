"""Mistakes that training would survive without a word, each with the test that must notice it.

    python tests/mutations.py

makes each mistake in a copy of the package and expects that its test fails there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in fdp/`file`; `test` fails then."""

    name: str
    file: str
    old: str
    new: str
    test: str


OPTIMIZER, TOY, HOOKS = (
    "tests/test_optimizer.py::",
    "tests/test_experiment.py::",
    "tests/test_hooks.py::",
)
MOE, ROUTER = "tests/models/test_moe.py::", "tests/models/test_router.py::"
PLANNER = "tests/parallel/context/test_planner.py::"
PIPELINE = "tests/parallel/pipeline/"
STATES, PARITY = "tests/models/test_recurrent.py::", "tests/models/test_state_parity.py::"
DOCUMENTS = "tests/models/test_recurrent_documents.py::"
PLANS = "tests/parallel/context/test_layer_plans.py::"
MUTATIONS = (
    Mutation(
        "balance statistics of this rank alone",
        "models/moe.py",
        "load_E = psum(count_BxE.sum(0), DATA_AXES)",
        "load_E = count_BxE.sum(0)",
        f"{MOE}test_state_and_metrics_of_two_steps_do_not_depend_on_the_mesh",
    ),
    Mutation(
        "the selection bias is in the weights",
        "models/router.py",
        "gates = jnp.take_along_axis(score_E, ids, -1)",
        "gates = jnp.take_along_axis(select_E, ids, -1)",
        f"{ROUTER}test_the_bias_moves_the_choice_and_neither_weights_nor_gradients",
    ),
    Mutation(
        "experts and their gradients are averaged over ep",
        "models/moe.py",
        "grouped_ffn(rows_RxD, w_in.astype(dtype)",
        "grouped_ffn(rows_RxD, (psum(w_in, 'ep') / size('ep')).astype(dtype)",
        f"{MOE}test_state_and_metrics_of_two_steps_do_not_depend_on_the_mesh",
    ),
    Mutation(
        "ties go to the higher id",
        "models/router.py",
        "_, ids = jax.lax.top_k(select_E, routing.topk)",
        "ids = -1 - jax.lax.top_k(select_E[..., ::-1], routing.topk)[1] + select_E.shape[-1]",
        f"{ROUTER}test_ties_go_to_the_lower_id",
    ),
    Mutation(
        "rows come back to the wrong pair",
        "parallel/expert/exchange.py",
        "back = permute(done, at.slots_NxK[:, 0], at.source_R[:, None])",
        "back = permute(done, at.slots_NxK[::-1, 0], at.source_R[:, None])",
        "tests/parallel/expert/test_dispatch.py::test_every_plan_is_the_dense_loop[2-random]",
    ),
    Mutation(
        "the learning rate rises to ten times its peak",
        "optimizer.py",
        "peak / 10",
        "peak * 10",
        f"{OPTIMIZER}test_the_rate_rises_to_its_peak_and_falls_to_a_tenth_along_a_cosine",
    ),
    Mutation(
        "gradients are not clipped",
        "optimizer.py",
        "optax.clip_by_global_norm(self.clip)",
        "optax.identity()",
        f"{OPTIMIZER}test_three_steps_equal_adamw_in_numpy",
    ),
    Mutation(
        "gradients of a part of the model are not clipped",
        "optimizer.py",
        "free = norm < clip",
        "free = norm < jnp.inf",
        "tests/test_mpmd_steps.py::test_three_ways_to_clip",
    ),
    Mutation(
        "weight decay on everything",
        "optimizer.py",
        "mask=decayed",
        "mask=None",
        f"{OPTIMIZER}test_three_steps_equal_adamw_in_numpy",
    ),
    Mutation(
        "vectors ask for weight decay",
        "models/module.py",
        "decay = len(shape) > 1 if decay is None else decay",
        "decay = True if decay is None else decay",
        f"{OPTIMIZER}test_matrices_decay_and_stacked_vectors_do_not",
    ),
    Mutation(
        "a gradient with a NaN is applied where the loss is finite",
        "step.py",
        "finite = jnp.isfinite(loss) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(loss)",
        f"{TOY}test_a_gradient_that_is_not_finite_is_not_applied_although_the_loss_is_finite",
    ),
    Mutation(
        "rules change the model's state in a step that is left out",
        "step.py",
        "model=jax.tree.map(keep, model, state.model)",
        "model=model",
        f"{TOY}test_a_gradient_that_is_not_finite_is_not_applied_although_the_loss_is_finite",
    ),
    Mutation(
        "the same noise in every train step",
        "step.py",
        "jax.random.fold_in(state.key, state.step)",
        "state.key",
        f"{TOY}test_every_step_and_every_evaluation_batch_has_noise_of_its_own",
    ),
    Mutation(
        "the same noise for every evaluation batch",
        "step.py",
        "jax.random.fold_in(jax.random.key(1_000_003), index)",
        "jax.random.key(1_000_003)",
        f"{TOY}test_every_step_and_every_evaluation_batch_has_noise_of_its_own",
    ),
    Mutation(
        "the loss is divided by rows instead of their weights",
        "step.py",
        "return objective.loss(outputs, rows).sum() / count, aux",
        "return objective.loss(outputs, rows).mean() * 1.0, aux",
        f"{TOY}test_the_mean_is_weighted_over_microbatches_and_devices",
    ),
    Mutation(
        "a hook that was due at the last step is not made up for",
        "loop.py",
        "then = last or (every > 0 and step % every == 0)",
        "then = every > 0 and step % every == 0",
        f"{HOOKS}test_a_hook_that_raises_is_named_and_the_run_resumes_from_its_step",
    ),
    Mutation(
        "the dearest plan for all layers is called the best",
        "parallel/context/planner_uniform.py",
        "return min(runs, key=lambda f: model_value(problem, f))",
        "return max(runs, key=lambda f: model_value(problem, f))",
        f"{PLANNER}test_best_uniform_is_the_least_of_all_plans_that_run",
    ),
    Mutation(
        "B reads the residuals of another microbatch",
        "parallel/pipeline/executor.py",
        'residuals = _take(kept[n], at["residual"])',
        'residuals = _take(kept[n], jnp.maximum(at["residual"] - 1, 0))',
        f"{PIPELINE}test_executor.py::test_a_scheduled_step_equals_the_plain_one[zb_h1]",
    ),
    Mutation(
        "every stage adds the gradient of the final norm",
        "parallel/pipeline/head.py",
        "else once(g) for g in grads",
        "else vary(g, LOSS_AXES) for g in grads",
        f"{PIPELINE}test_vocabulary.py::test_a_shared_head_equals_one_device[zb_h1, tp]",
    ),
    Mutation(
        "S runs before F",
        "parallel/pipeline/vocabulary.py",
        'done["F", last, k] + 0.5',
        'done["F", last, k] - 0.5',
        f"{PIPELINE}test_vocabulary.py::test_heads_pause_an_order_and_hold_no_more[2-1f1b]",
    ),
    Mutation(
        "the second half reads the skips of another microbatch",
        "parallel/pipeline/executor.py",
        'return (message, _take(skips, at["skip"])) if reads else message',
        'return (message, _take(skips, jnp.maximum(at["skip"] - 1, 0))) if reads else message',
        f"{PIPELINE}test_skips.py::test_a_u_vit_on_a_v_equals_one_device_and_sends_no_skip",
    ),
    Mutation(
        "a slot is taken again while it is read",
        "parallel/pipeline/table.py",
        "if free <= start:",
        "if free <= start + 1:",
        f"{PIPELINE}test_table.py::test_every_operation_reads_its_own_slots[zb_h1 p=4 v=1]",
    ),
    Mutation(
        "the optimizer of a stage runs before its last W",
        "parallel/pipeline/orders.py",
        'return moved + [Op("U", step, c) for c in range(v)]',
        'return moved[:-1] + [Op("U", step, c) for c in range(v)] + moved[-1:]',
        f"{PIPELINE}test_check.py::test_repeated_zbv_is_legal_and_dropping_an_optimizer_is_not",
    ),
    Mutation(
        "what only a weight's gradient needs is in both halves",
        "parallel/pipeline/split.py",
        "needed = {v for v in wanted if _variable(v)}",
        "needed = {v for v in jaxpr.outvars if _variable(v)}",
        f"{PIPELINE}test_split.py::test_halves_are_the_backward_pass_and_compute_nothing_twice"
        "[plain]",
    ),
    Mutation(
        "a gate of one plus, which is no identity at the start",
        "models/stack.py",
        "x_BxLxD + gate * part(",
        "x_BxLxD + (1 + gate) * part(",
        "tests/models/test_image_parity.py::"
        "test_dit_is_the_published_one_and_a_gate_of_one_plus_is_not",
    ),
    Mutation(
        "images go to their places before they have a noise level",
        "objectives/image.py",
        "x, noise, sigma_B, labels_B = (a[place_B] for a in (x, noise, sigma_B, labels_B))",
        "noise, sigma_B = (a[place_B] for a in (noise, sigma_B))",
        "tests/objectives/test_image.py::test_noise_is_drawn_before_rows_are_sorted",
    ),
    Mutation(
        "steps whose clipping was checked too late stay as they are",
        "mpmd_steps.py",
        "self._roll_back(k, early)",
        "self.rolled.append(k)",
        "tests/test_mpmd_steps.py::test_three_ways_to_clip",
    ),
    Mutation(
        "a step is updated again from where its update had led",
        "mpmd_steps.py",
        "before, grads = self.before[u], self.grads[k][u]",
        "before, grads = self.held[u], self.grads[k][u]",
        "tests/test_mpmd_steps.py::test_three_ways_to_clip",
    ),
    Mutation(
        "the state of Gated DeltaNet is kept across documents, token by token",
        "models/delta.py",
        "state = jnp.where(at.fresh[:, None, None, None], 0, state)",
        "state = state",
        f"{STATES}test_chunks_equal_the_recurrence[documents]",
    ),
    Mutation(
        "the state of Gated DeltaNet is kept across documents of a chunk",
        "models/delta.py",
        "keep = jnp.where(document[..., -1] == 0, keep, 0)",
        "keep = keep",
        f"{STATES}test_chunks_equal_the_recurrence[documents]",
    ),
    Mutation(
        "a token of a chunk does not read itself",
        "models/delta.py",
        "past, fresh = order[:, None] >= order, None",
        "past, fresh = order[:, None] > order, None",
        f"{STATES}test_chunks_equal_the_recurrence[stream]",
    ),
    Mutation(
        "a token corrects what the state held before it decayed",
        "models/delta.py",
        'held = jnp.einsum("bhkv,bhk->bhv", state, at.k)',
        'held = jnp.einsum("bhkv,bhk->bhv", state / jnp.exp(at.log_decay)[..., None, None], at.k)',
        f"{PARITY}test_the_gated_delta_rule[token by token]",
    ),
    Mutation(
        "maps are composed in the wrong order",
        "models/delta.py",
        "found = later[..., :K] @ earlier",
        "found = earlier[..., :K] @ later",
        f"{STATES}test_maps_of_parts_compose_in_order_to_the_map_of_the_whole",
    ),
    Mutation(
        "the maps of devices are applied in the wrong order",
        "parallel/context/state.py",
        'maps = all_gather(map_BxH[None], "cp", dim=0)',
        'maps = all_gather(map_BxH[None], "cp", dim=0)[::-1]',
        f"{STATES}test_every_plan_equals_one_device[gdn, affine]",
    ),
    Mutation(
        "a device applies its own map before it starts",
        "models/delta.py",
        "jnp.where(number < count, apply(both, state), state)",
        "jnp.where(number <= count, apply(both, state), state)",
        f"{STATES}test_every_plan_equals_one_device[gdn, affine]",
    ),
    Mutation(
        "decay and rate of Gated DeltaNet change places",
        "models/recurrent.py",
        "beta = jax.nn.sigmoid(found[..., 1])",
        "beta = jax.nn.sigmoid(found[..., 0])",
        f"{PARITY}test_the_layer_of_gated_deltanet",
    ),
    Mutation(
        "the sign of an update",
        "models/fast_weights.py",
        "new = w + by",
        "new = w - by",
        f"{PARITY}test_the_chunks_of_lact",
    ),
    Mutation(
        "the sign of the gradient of fast weights",
        "models/fast_weights.py",
        'back = jnp.einsum("bhkf,bhck->bhcf", weights.down, v)',
        'back = -jnp.einsum("bhkf,bhck->bhcf", weights.down, v)',
        f"{STATES}test_an_update_is_minus_the_gradient_of_the_loss",
    ),
    Mutation(
        "the rates of gate, up and down change places",
        "models/fast_weights.py",
        "(rates_BxHxCx3[..., i, None] for i in range(3))",
        "(rates_BxHxCx3[..., 2 - i, None] for i in range(3))",
        f"{PARITY}test_the_chunks_of_lact",
    ),
    Mutation(
        "a chunk is updated on before it is read",
        "models/fast_weights.py",
        "return update(*carried, part), read_by(memory[0], part.q, earlier)",
        "return (new := update(*carried, part)), read_by(new[0], part.q, earlier)",
        f"{STATES}test_no_output_depends_on_a_later_token[lact, tokens]",
    ),
    Mutation(
        "fast weights are kept across documents",
        "models/fast_weights.py",
        "same = self.before == self.last",
        "same = self.last == self.last",
        f"{DOCUMENTS}test_a_document_is_read_as_if_it_were_alone[lact]",
    ),
    Mutation(
        "a token reads what another document has left",
        "models/fast_weights.py",
        "return self.each == self.before[:, None]",
        "return self.each == self.each",
        f"{DOCUMENTS}test_a_document_is_read_as_if_it_were_alone[lact]",
    ),
    Mutation(
        "all documents of a mini-batch move the weights that are handed on",
        "models/fast_weights.py",
        "return self.each == self.last[:, None]",
        "return self.each == self.each",
        f"{DOCUMENTS}test_a_document_is_read_as_if_it_were_alone[ttt]",
    ),
    Mutation(
        "every device takes the last document of its own part of a chunk",
        "parallel/context/state.py",
        "return broadcast(x, among, size(among) - 1)",
        "return x",
        f"{DOCUMENTS}test_documents_over_cp_equal_one_device_and_their_ids_are_counted"
        "[lact, tokens]",
    ),
    Mutation(
        "the near one of two memories never begins anew",
        "models/two_memories.py",
        "x_BxL.reshape(B * L // self.reset, self.reset, *x_BxL.shape[2:])",
        "x_BxL",
        "tests/models/test_two_memories.py::test_what_is_read_is_the_sum_of_both_parts",
    ),
    Mutation(
        "rows take the length 1 instead of their first",
        "models/fast_weights.py",
        "scale = norms * jax.lax.rsqrt",
        "scale = jax.lax.rsqrt",
        f"{PARITY}test_the_chunks_of_lact",
    ),
    Mutation(
        "the velocity is what Newton-Schulz made of it",
        "models/fast_weights.py",
        "FastWeights(*(vary_like(g, m) for g, m in zip(gained, velocity, strict=True)))",
        "FastWeights(*(vary_like((orthogonalise or jnp.asarray)(g), m) "
        "for g, m in zip(gained, velocity, strict=True)))",
        f"{PARITY}test_the_chunks_of_lact",
    ),
    Mutation(
        "Newton-Schulz before the sum over devices",
        "models/lact.py",
        "Sharing(lambda x: psum(x, outer), devices=parts, ends=ends)",
        "Sharing(lambda x: x, lambda x: psum(x, outer), parts, ends)",
        f"{STATES}test_every_plan_equals_one_device[lact, tokens]",
    ),
    Mutation(
        "the momentum of a device's own tokens",
        "models/fast_weights.py",
        "kept = sharing.total(at.momentum.sum(-1)) / (chunk * sharing.devices)",
        "kept = at.momentum.mean(-1)",
        f"{STATES}test_every_plan_equals_one_device[lact, tokens]",
    ),
    Mutation(
        "the mean of the updates of devices instead of their sum",
        "models/fast_weights.py",
        "gained = FastWeights(*map(sharing.total, step(weights, at.k, at.v, at.rates)))",
        "gained = FastWeights(*(sharing.total(g) / sharing.devices for g in "
        "step(weights, at.k, at.v, at.rates)))",
        f"{STATES}test_a_model_trains_as_one_device_and_sends_what_the_layers_state"
        "[lact, tokens+ns]",
    ),
    Mutation(
        "tokens of a chunk in the contiguous layout",
        "parallel/context/state.py",
        'if self.layout.kind != "striped" or self.layout.block * cp != chunk:',
        'if self.layout.kind == "zigzag":',
        f"{STATES}test_plans_that_cannot_run_are_refused",
    ),
    Mutation(
        "the affine plan in a layout that deals positions out",
        "parallel/context/state.py",
        'if self.kind == "affine" and self.layout != CONTIGUOUS:',
        'if self.kind == "affine" and self.layout.kind == "striped":',
        f"{STATES}test_plans_that_cannot_run_are_refused",
    ),
    Mutation(
        "heads see the sequence in the order of the layout",
        "parallel/context/state.py",
        "split_dim=2, concat_dim=1)[:, back] for x in tokens]",
        "split_dim=2, concat_dim=1) for x in tokens]",
        f"{STATES}test_every_plan_equals_one_device[ttt, heads]",
    ),
    Mutation(
        "every device of a wavefront begins with the first weights",
        "parallel/context/state.py",
        "jnp.where(me == 0, a, b), first, arrived",
        "jnp.where(me >= 0, a, b), first, arrived",
        f"{STATES}test_a_model_trains_as_one_device_and_sends_what_the_layers_state"
        "[ttt, wavefront]",
    ),
    Mutation(
        "every device takes the first heads of a parameter",
        "parallel/context/state.py",
        "jax.lax.dynamic_slice_in_dim(x, index(among) * share, share)",
        "jax.lax.dynamic_slice_in_dim(x, 0 * index(among), share)",
        f"{STATES}test_every_plan_equals_one_device[ttt, heads]",
    ),
    Mutation(
        "every device of a wavefront begins with the first weights",
        "parallel/context/state.py",
        "jnp.where(me == 0, a, b)",
        "jnp.where(me >= 0, a, b)",
        f"{STATES}test_every_plan_equals_one_device[ttt, wavefront]",
    ),
    Mutation(
        "a wavefront hands on weights once a piece, not in every tick",
        "models/ttt.py",
        "heads // m * ticks * K",
        "heads // m * m * K",
        f"{STATES}test_every_plan_equals_one_device[ttt, wavefront]",
    ),
    Mutation(
        "steps of a chain take no time",
        "parallel/context/layer_plans.py",
        "option.chain * self.step)",
        "0.0)",
        f"{PLANS}test_steps_of_a_chain_take_their_time_at_least",
    ),
    Mutation(
        "the sign of TTT-Linear's steps",
        "models/fast_weights.py",
        "fast.weight - jnp.swapaxes(k, -1, -2) @ steps",
        "fast.weight + jnp.swapaxes(k, -1, -2) @ steps",
        f"{STATES}test_the_dual_form_is_a_step_on_every_token",
    ),
    Mutation(
        "a token of TTT-Linear reads later steps of its mini-batch",
        "models/fast_weights.py",
        "past = jnp.tril(jnp.ones((batch, batch)))",
        "past = jnp.ones((batch, batch))",
        f"{STATES}test_no_output_depends_on_a_later_token[ttt, heads]",
    ),
    Mutation(
        "a scan's FLOPs without its trip count",
        "count/jaxpr.py",
        'return eqn.params["length"]',
        "return 1",
        f"{STATES}test_flops_equal_the_jaxpr[lact, tokens]",
    ),
    Mutation(
        "updates of a sequence are counted once, not once a chunk",
        "models/lact.py",
        "updates = max(-(-rows.length // self.chunk) - 1, 0)",
        "updates = min(max(-(-rows.length // self.chunk) - 1, 0), 1)",
        f"{STATES}test_a_model_trains_as_one_device_and_sends_what_the_layers_state"
        "[lact, tokens+ns]",
    ),
    Mutation(
        "the cheapest path does not see the price of a move",
        "parallel/context/layer_plans.py",
        "move = on.move(hidden), on.moved(hidden)",
        "move = 0.0, 0.0",
        f"{PLANS}test_a_layer_changes_layout_only_where_that_pays",
    ),
    Mutation(
        "a plan's price leaves out its moves",
        "parallel/context/layer_plans.py",
        "found.seconds + found.moves * on.move(hidden)",
        "found.seconds",
        f"{PLANS}test_a_plan_costs_its_layers_and_its_moves",
    ),
    Mutation(
        "the dearest options are chosen",
        "parallel/context/layer_plans.py",
        "[{o: ((on.seconds(o), o.wire), 0.0)",
        "[{o: ((-on.seconds(o), o.wire), 0.0)",
        f"{PLANS}test_the_best_path_is_that_of_trying_all",
    ),
    Mutation(
        "compute hides more than a transfer takes",
        "parallel/context/layer_plans.py",
        "max(0.0, self._send(t) - t.hidden / self._rate)",
        "self._send(t) - t.hidden / self._rate",
        f"{PLANS}test_compute_hides_no_more_than_the_transfer",
    ),
    Mutation(
        "a layer takes more memory than there is",
        "parallel/context/layer_plans.py",
        "if option.memory <= on.memory]",
        "if option.memory >= 0]",
        f"{PLANS}test_what_does_not_fit_is_no_option",
    ),
)


def copied(folder: Path) -> None:
    """What the tests need, in `folder`."""
    for name in ("fdp", "tests", "configs"):
        unread = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=unread)
    shutil.copy(ROOT / "pyproject.toml", folder)


def tested(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    """Outcome of `tests` on the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def survives(mutation: Mutation) -> str:
    """What speaks against the tests: "" when the mutation's test notices it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copied(folder)
        path = folder / "fdp" / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return (
                f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times, not once"
            )
        path.write_text(text.replace(mutation.old, mutation.new))
        done = tested(folder, mutation.test)
    noticed = done.returncode == 1 and f"FAILED {mutation.test}" in done.stdout
    return "" if noticed else f"{mutation.test} does not notice:\n{done.stdout[-1000:]}"


def healthy() -> str:
    """What speaks against the copy itself: "" when all tests named here pass without a mutation."""
    with tempfile.TemporaryDirectory() as made:
        copied(Path(made))
        done = tested(Path(made), *{m.test: None for m in MUTATIONS})
    return "" if done.returncode == 0 else done.stdout[-3000:]


if __name__ == "__main__":
    wrong = 0
    for name, found in [("no mutation", healthy()), *((m.name, survives(m)) for m in MUTATIONS)]:
        wrong += bool(found)
        print(f"{'SURVIVES' if found else 'ok':9}{name}{found and ': ' + found}", flush=True)
    sys.exit(wrong > 0)
