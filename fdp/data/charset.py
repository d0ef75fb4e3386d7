"""Which encoding a text is in that is not Unicode: one byte or two a character, and nothing in the
file that says which.

charset-normalizer tells scripts and encodings of East Asia apart. Encodings of the Latin script
share most bytes, and its choice among them is a coin toss, so that choice is made here: the right
one is where the letters outside ASCII belong to one language's alphabet."""

import io
import re
from collections import Counter

from charset_normalizer import from_bytes

# Files of text in the wild. Supersets stand for what they contain: cp1252 for latin-1, gb18030 for
# gbk, cp932 for Shift-JIS, cp949 for EUC-KR, cp866 and its like for one another.
LATIN = ("cp1252", "iso8859_15", "cp1250", "iso8859_2", "cp1254", "cp1257")
LATIN_OLD = ("mac_roman", "cp850", "cp852")  # where none of the others explains the text
OTHER_SCRIPTS = (
    *("cp1251", "koi8_r", "koi8_u", "iso8859_5", "cp866"),
    *("cp1253", "iso8859_7", "cp1255", "cp1256", "iso8859_6", "cp874"),
    *("gb18030", "big5", "big5hkscs", "cp932", "euc_jp", "cp949"),
)

# Letters outside ASCII of languages that were written in one byte a letter.
WESTERN = (
    "àâæçéèêëîïôœùûüÿ",  # French
    "äöüßéà",  # German
    "áéíñóúüïç",  # Spanish
    "àáâãçéêíóôõúüª",  # Portuguese
    "àèéìíîòóùú",  # Italian
    "éèëïíóöüáàäêç",  # Dutch
    "àçèéíïòóúü",  # Catalan
    "åäöéàü",  # Swedish, Finnish
    "æøåéèêóòôüäö",  # Danish, Norwegian
    "áðéíóúýþæö",  # Icelandic
)
ALPHABETS = (
    *WESTERN,
    "áčďéěíňóřšťúůýž",  # Czech
    "áäčďéíĺľňóôŕšťúýž",  # Slovak
    "ąćęłńóśźż",  # Polish
    "áéíóöőúüű",  # Hungarian
    "ăâîșțşţ",  # Romanian
    "čćđšž",  # Croatian, Slovene
    "çğıöşüâîûİ",  # Turkish
    "çë",  # Albanian
    "äõöüšž",  # Estonian
    "āčēģīķļņšūž",  # Latvian
    "ąčęėįšųūž",  # Lithuanian
)
# Between letters as well; the second string only where no letters are on both sides.
ANYWHERE = "’‘–—…\xa0\xad·µªº"
SIGNS = "“”„«»‹›•°§©®™€£¥¢½¼¾²³¹×±¡¿†‡´¨"

WORDS = 0.3  # share of bytes outside ASCII in runs of three and more: another script
EXPLAINED = 0.98  # least share of the characters outside ASCII that must fit
LIKELY = 0.8  # and the share below which not even a guess is made
FEW = 0.03  # share of letters outside ASCII below which a text is English, or nearly
MESS = 0.2  # charset-normalizer's own bound of "chaos", from 0 to 1
SAME = 0.005  # two of its figures that say the same
SAMPLE_BYTES = 1 << 16
SAMPLE_CHUNKS = 16


class Unsure(ValueError):
    """No encoding is certain; `likely` are the names of those that may be right, the best
    first."""

    def __init__(self, likely: list[str]):
        self.likely = [common_name(name) for name in likely]
        super().__init__(", ".join(self.likely))


def common_name(name: str) -> str:
    """An encoding as the world outside Python calls it, iconv included."""
    others = {"mac_roman": "macintosh", "big5hkscs": "big5-hkscs"}
    return others.get(name, name.replace("iso8859_", "iso-8859-").replace("_", "-"))


def legacy_encoding(data: bytes) -> str:
    """Python's name of the encoding of `data`, which is not Unicode and not ASCII.

    Raises Unsure where no encoding fits, or where two fit and read different texts."""
    sample = _sample(data)
    if _in_long_runs(sample) > WORDS and (name := _other_script(sample)):
        return name
    return _latin(data, sample)


def _other_script(sample: bytes) -> str:
    """The encoding of a text in another script than Latin; "" where it seems to be Latin."""
    chunk = min(SAMPLE_BYTES // SAMPLE_CHUNKS, max(len(sample) // SAMPLE_CHUNKS, 1))
    names = [*LATIN, *LATIN_OLD, *OTHER_SCRIPTS]
    found = list(from_bytes(sample, SAMPLE_CHUNKS, chunk, MESS, names, enable_fallback=False))
    if not found or found[0].encoding not in OTHER_SCRIPTS:
        return ""
    first = found[0]
    rivals = [
        other.encoding
        for other in found[1:]
        if other.chaos < first.chaos + SAME
        and other.coherence > first.coherence - SAME
        and str(other) != str(first)
    ]
    if rivals:  # a few words only
        raise Unsure([first.encoding, *rivals])
    return first.encoding


def _sample(data: bytes) -> bytes:
    """Whole lines with bytes outside ASCII, up to about SAMPLE_BYTES."""
    # A byte below 0x30, as a line end is, belongs to no longer character in the encodings above.
    lines, size = [], 0
    for line in io.BytesIO(data):
        if not line.isascii():
            lines.append(line)
            size += len(line)
        if size >= SAMPLE_BYTES:
            break
    return b"".join(lines)


def _latin(data: bytes, sample: bytes) -> str:
    scores = {name: _explained(_text(sample, name), ALPHABETS) for name in (*LATIN, *LATIN_OLD)}
    for group in (LATIN, LATIN_OLD):
        most = max(scores[name] for name in group)
        best = [name for name in group if scores[name] == most]
        if most < EXPLAINED:
            continue
        if len({_text(sample, name) for name in best}) == 1:
            return best[0]
        if "cp1252" in best and _share_outside_ascii(data) < FEW:
            return "cp1252"
        raise Unsure(best)
    # Names and quotations of several languages, none of which explains all.
    if _explained(_text(sample, "cp1252"), ("".join(WESTERN),)) >= EXPLAINED:
        return "cp1252"
    best = [name for name in scores if scores[name] == max(scores.values()) >= LIKELY]
    raise Unsure(best)


def _in_long_runs(sample: bytes) -> float:
    runs = re.findall(rb"[\x80-\xff]{3,}", sample)
    return sum(map(len, runs)) / max(len(re.findall(rb"[\x80-\xff]", sample)), 1)


def _text(sample: bytes, name: str) -> str:
    return sample.decode(name, "replace")


def _share_outside_ascii(data: bytes) -> float:
    letters = [char for char in _text(data[:SAMPLE_BYTES], "cp1252") if char.isalpha()]
    return sum(map(_is_other_letter, letters)) / max(len(letters), 1)


def _explained(text: str, alphabets: tuple[str, ...]) -> float:
    """Largest share over the alphabets of characters outside ASCII that are letters of it, or
    signs, in a place where they can stand."""
    padded = f"  {text} "
    n, signs = 0, 0
    letters: Counter[str] = Counter()
    around = Counter(zip(padded, padded[1:], padded[2:], padded[3:], strict=False))
    for (second, before, char, after), count in around.items():
        if char < "\x80":
            continue
        n += count
        if char in ANYWHERE:
            signs += count
        elif char.isalpha():
            # Four letters outside ASCII in a row are of another script.
            within = all(map(_is_other_letter, (second, before, after)))
            odd = before.isdigit() or after.isdigit() or (before.islower() and char.isupper())
            letters[char] += 0 if within or odd else count
        elif char in SIGNS and not (before.isalpha() and after.isalpha()):
            signs += count
    covered = (
        sum(count for char, count in letters.items() if char in known or char.lower() in known)
        for known in alphabets
    )
    return (signs + max(covered)) / n if n else 1.0


def _is_other_letter(char: str) -> bool:
    return char >= "\x80" and char.isalpha() and char not in ANYWHERE
