"""The verifier of topic 4 and its draft models: the same tokens and loss, fewer and narrower
layers."""

import ml_collections

from fdp.experiment import Experiment, standard
from fdp.keys import UserError
from fdp.topics.speculative_dlm.settings import DRAFTS

VERIFIER = "verifier"
SHALLOW = 4  # a draft has a quarter of the layers


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The verifier, and a draft of every size of `speculation.drafts`."""
    verifier = standard(config)
    found = {VERIFIER: verifier}
    for name in config.speculation.drafts:
        found[name] = standard(draft_config(config, DRAFTS[name]), verifier.data)
        check_pair(verifier, found[name])
    return found


def draft_config(config: ml_collections.ConfigDict, share: float) -> ml_collections.ConfigDict:
    """The config of a draft with about `share` of the verifier's parameters. Heads stay as many,
    so that tp divides them."""
    c = config.copy_and_resolve_references()
    m = c.model
    layers = max(1, m.layers // SHALLOW)
    ratio = (share * m.layers / layers) ** 0.5  # parameters grow with layers · width²
    head_dim = max(2, 2 * round(m.width * ratio / m.heads / 2))  # even: positions turn pairs
    ffn = m.heads * max(1, round(m.ffn * ratio / m.heads))
    m.update(layers=layers, width=m.heads * head_dim, head_dim=head_dim, ffn=ffn)
    return c


def check_pair(verifier: Experiment, draft: Experiment) -> None:
    """Raise UserError for a draft that speaks of other tokens than the verifier."""
    ours, theirs = (_tokens(e) for e in (verifier, draft))
    for what, mine, other in zip(("vocabulary", "mask id"), ours, theirs, strict=True):
        if mine != other:
            raise UserError(
                f"{what} of the draft = {other}, of the verifier = {mine}: a drafted id must mean "
                "the same to both; train the draft with the verifier's data and model.vocab"
            )


def _tokens(e: Experiment) -> tuple[int, int]:
    """(vocabulary, mask id)."""
    model, objective = e.model, e.objective
    return model.shape.vocab, objective.n_ids  # type: ignore[attr-defined]
