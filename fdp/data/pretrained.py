"""A tokenizer from a file `tokenizer.json`, as published with a model.

Its ids stay as they are, its own special tokens among them. Text never gives one of those, as our
end-of-text and mask never come from text: these two get the ids behind its vocabulary."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from fdp.data.tokenizer import Tokenizer

# What a reversible map gives back: a tab, capitals, accents, ideographs, an emoji, an end of line.
PROBE = "A tab\tand  naïve Čapek, 港务长 🏴, 12,5 €\n"


def pretrained(name: str) -> Tokenizer:
    """The tokenizer of the file `name`.

    Raises FileNotFoundError where it is not there, ValueError where it is no tokenizer."""
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        found = tokenizers.Tokenizer.from_str(text)
        ids = sorted(found.get_vocab().values())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.tokenizer={name!r}: no such file ({path.absolute()}): give the path of a "
            "tokenizer.json, or byte or bpe"
        ) from error
    except Exception as error:  # the Rust parser raises bare Exception
        told = " ".join(str(error).split())[:120]
        raise ValueError(
            f"data.tokenizer={name!r} is no tokenizer of the library tokenizers ({told}): give a "
            "tokenizer.json, or byte or bpe"
        ) from error
    if not ids:
        raise ValueError(f"data.tokenizer={name!r} has no tokens: give another tokenizer.json")
    found.no_truncation()  # published files may cut and pad
    found.no_padding()
    found.encode_special_tokens = True  # as text

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = found.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode_text(run: Sequence[int]) -> str:
        return found.decode(list(run), skip_special_tokens=False)

    fingerprint = hashlib.sha256(b"pretrained " + text.encode()).hexdigest()
    given_back = decode_text(encode_batch([PROBE])[0].tolist())
    notes = (f"{path.name} loses text: {PROBE!r} becomes {given_back!r}",) * (given_back != PROBE)
    return Tokenizer(ids[-1] + 1, encode_batch, decode_text, fingerprint, notes)
