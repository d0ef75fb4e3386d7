"""Mistakes that training would survive without a word, each with the test that must notice it.

    python tests/mutations.py

makes each mistake in a copy of the package and expects that its test fails there. Those of layers
with a state are in mutations_state.py, in speculation in mutations_speculation.py.
"""

import sys

from mutating import Mutation, healthy, survives
from mutations_speculation import SPECULATION
from mutations_state import STATE

OPTIMIZER, TOY, HOOKS = (
    "tests/test_optimizer.py::",
    "tests/test_experiment.py::",
    "tests/test_hooks.py::",
)
MOE, ROUTER = "tests/models/test_moe.py::", "tests/models/test_router.py::"
PLANNER = "tests/parallel/context/test_planner.py::"
PIPELINE = "tests/parallel/pipeline/"
BLOCKS = "tests/sampling/test_block_cache.py::"
SHARDED = "tests/sampling/test_sharded_cache.py::"
CORE = (
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
        "a finished block is not read again by its clean tokens",
        "sampling/block_cache.py",
        "lambda: how.fill(variables, at.cache, rows_BxR, at.start), lambda: at.cache",
        "lambda: at.cache, lambda: at.cache",
        f"{BLOCKS}test_ids_are_those_of_the_sampler_without_a_cache[jacobi]",
    ),
    Mutation(
        "the prefix holds keys of masked rows",
        "sampling/block_cache.py",
        "how.fill(variables, at.cache, rows_BxR, at.start)",
        "how.fill(variables, at.cache, jnp.full_like(rows_BxR, draw.n_ids), at.start)",
        f"{BLOCKS}test_ids_are_those_of_the_sampler_without_a_cache[jacobi]",
    ),
    Mutation(
        "every block begins with the noise of step 0",
        "sampling/block_cache.py",
        "first=at.step_B",
        "first=0",
        f"{BLOCKS}test_ids_are_those_of_the_sampler_without_a_cache[jacobi]",
    ),
    Mutation(
        "a state reads the prefix of another sample",
        "sampling/block_cache.py",
        "jnp.moveaxis(x_NxRx.reshape(N // B, B, R, *x_NxRx.shape[2:]), 0, 1)",
        "x_NxRx.reshape(B, N // B, R, *x_NxRx.shape[2:])",
        f"{BLOCKS}test_logits_are_those_of_the_model_without_a_cache",
    ),
    Mutation(
        "every device of cp caches every row",
        "parallel/context/cache.py",
        "(index_BxR % cp == device) & ",
        "",
        "tests/parallel/context/test_cache.py::test_devices_hold_what_a_list_holds",
    ),
    Mutation(
        "keys of a prompt are cached where they were computed",
        "models/attention.py",
        "sharded.deal(k_BxLxKxC, v_BxLxKxC, self.core.layout)",
        "(k_BxLxKxC, v_BxLxKxC)",
        f"{SHARDED}test_ids_over_cp_are_those_of_one_device[cp4]",
    ),
    Mutation(
        "all sequences have the noise of the longest",
        "sampling/autoregressive.py",
        "keys = position_keys(draw.key, draw.sample_ids_B, 0, i[..., None])[:, 0]",
        "keys = position_keys(draw.key, draw.sample_ids_B, 0, i.max()[None])[:, 0]",
        f"{SHARDED}test_ids_after_ragged_prompts_are_those_of_a_sampler_that_recomputes",
    ),
)
MUTATIONS = (*CORE, *STATE, *SPECULATION)


if __name__ == "__main__":
    wrong = 0
    for name, found in [
        ("no mutation", healthy(MUTATIONS)),
        *((m.name, survives(m)) for m in MUTATIONS),
    ]:
        wrong += bool(found)
        print(f"{'SURVIVES' if found else 'ok':9}{name}{found and ': ' + found}", flush=True)
    sys.exit(wrong > 0)
