"""Mistakes in chains and speculation that look lossless (see mutations.py)."""

from mutating import Mutation

TESTS = "tests/sampling/test_speculative.py::"
IDS = f"{TESTS}test_whatever_drafts_the_ids_are_those_of_the_verifier_alone"
FILE = "sampling/speculative.py"
TAKEN = "taken_B = jnp.cumprod(same, axis=0, dtype=jnp.int32).sum(0)"
SPECULATION = (
    Mutation(
        "a rejected step is drawn anew from the verifier's law",
        FILE,
        "return lambda score, logits, states: chain.apply(",
        "return lambda score, logits, states: replace(chain, stream=RESIDUAL).apply(",
        f"{IDS}[first_hitting-ModelDrafter]",
    ),
    Mutation(
        "all drafts are kept",
        FILE,
        TAKEN,
        "taken_B = jnp.full_like(none_B, window - 1)",
        f"{IDS}[first_hitting-ModelDrafter]",
    ),
    Mutation(
        "a round goes on past a rejection",
        FILE,
        TAKEN,
        "taken_B = same.sum(0, dtype=jnp.int32)",
        f"{IDS}[entropy-ModelDrafter]",
    ),
    Mutation(
        "a rejected step is that of the last drafted state",
        FILE,
        "_every(_shared(chain), score, logits, states)",
        "_every(_shared(chain), score, jnp.broadcast_to(logits[-1:], logits.shape), states)",
        f"{IDS}[first_hitting-ModelDrafter]",
    ),
    Mutation(
        "one edit is near enough",
        FILE,
        "same = (after.z_BxL[:-1] == states.z_BxL[1:]).all(-1)",
        "same = jax.vmap(edit_distance)(after.z_BxL[:-1], states.z_BxL[1:]) <= 1",
        f"{IDS}[first_hitting-ModelDrafter]",
    ),
    Mutation(
        "edit distance need not be asked for",
        FILE,
        "if not lossy:",
        "if tolerance and not lossy:",
        f"{TESTS}test_edit_distance_has_to_be_asked_for",
    ),
    Mutation(
        "drafts without numbers are accepted",
        FILE,
        "same &= ~carry.draft.bad",
        "same |= carry.draft.bad",
        f"{IDS}[first_hitting-ModelDrafter]",
    ),
    Mutation(
        "rule coupling draws rejected tokens from the verifier's law, not from the residual",
        FILE,
        "rest = jnp.where(none, p, jnp.where(rest > 0, jnp.log(jnp.maximum(rest, 1e-38)), NEVER))",
        "rest = p",
        f"{TESTS}test_coupling_keeps_the_law_and_edit_distance_does_not",
    ),
    Mutation(
        "a token has the noise of another place",
        "sampling/chain.py",
        "keys = picked(self.keys(state, self.stream), places_BxR)",
        "keys = self.keys(state, self.stream)[:, : places_BxR.shape[1]]",
        f"{TESTS}test_ids_are_those_of_before_chains",
    ),
)
