"""The verifier of topic 4 and its draft models: fewer and narrower layers, which learn from the
same tokens with the same loss, or from the verifier."""

from dataclasses import replace

import ml_collections

from fdp.experiment import Experiment, standard
from fdp.keys import UserError
from fdp.topics.speculative_dlm.distillation import Distillation
from fdp.topics.speculative_dlm.hinted import hinted
from fdp.topics.speculative_dlm.settings import DRAFTS, TEXT, TEXTS, VERIFIER, WIDE, drafts, tasks
from fdp.topics.speculative_dlm.teaching import awaited

SHALLOW = 4  # a draft has a quarter of the layers


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The verifier, a draft of every size of `speculation.drafts`, and with as many steps on
    batches of as many tokens, one for every other way to train it in `speculation.lessons`."""
    verifier = standard(config)
    found = {VERIFIER: verifier}
    for name, (size, lesson) in drafts(config).items():
        plain = standard(draft_config(config, DRAFTS[size]), verifier.data)
        found[name] = taught(config, verifier, plain, lesson) if lesson else plain
        check_pair(verifier, found[name])
    for text in config.speculation.texts:
        own, (name, names) = text_config(config, text), tasks(config)[text]
        found[name] = standard(own)
        for size, draft in zip(config.speculation.drafts, names, strict=True):
            found[draft] = standard(draft_config(own, DRAFTS[size]), found[name].data)
            check_pair(found[name], found[draft])
    return found


def text_config(config: ml_collections.ConfigDict, text: str) -> ml_collections.ConfigDict:
    """The config of the verifier of one of TEXTS."""
    c = config.copy_and_resolve_references()
    source, c.objective.name = TEXTS[text]
    if config.data.source != "blank":
        c.data.source = source
    c.data.update(tokenizer="byte", seq_len=TEXT)
    c.speculation.update(texts=(), lessons=())
    c.model.vocab = 264  # bytes, a mask and what makes it even over tp
    return c


def taught(
    config: ml_collections.ConfigDict, verifier: Experiment, plain: Experiment, lesson: str
) -> Experiment:
    """The draft `plain`, which learns from the verifier instead of the data, by one of LESSONS."""
    s, n_ids = config.speculation, _tokens(verifier)[1]
    model, reach = plain.model, 0
    if lesson == "hinted":
        model, reach = hinted(model, n_ids), min(WIDE, verifier.data.seq_len)
    data = replace(awaited(verifier, s.taught, reach), awaits=(VERIFIER,))
    axes = plain.objective.axes  # type: ignore[attr-defined]
    return replace(plain, model=model, data=data, objective=Distillation(n_ids, s.hard, axes=axes))


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
    c.train.steps *= c.speculation.longer
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
