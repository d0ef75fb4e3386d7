"""RULER's tasks: the published prompts, answers that are in the text once, and a score that talk
does not raise.
"""

import hashlib
import re

import numpy as np
import pytest

from fdp.data import ruler_text
from fdp.data.recall import accuracy, exact, task_data
from fdp.data.ruler import KINDS, RulerWords
from fdp.data.ruler_text import ByteNeedle, Prompt, RulerText, grid

pytestmark = pytest.mark.fast

KEY, NUMBER, VAR = r"[a-z]+", r"\d{7}", r"[A-Z]{5}"
ONE = (
    r"(?s)A special magic number is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the number afterwards\.\n.+\nWhat is the special magic number for "
    rf"({KEY}) mentioned in the provided text\? The special magic number for \1 mentioned in the "
    r"provided text is "
)
SEVERAL = (
    r"(?s)Some special magic numbers are hidden within the following text\. Make sure to memorize "
    r"it\. I will quiz you about the numbers afterwards\.\n.+\nWhat are all the special magic "
    rf"numbers for ({KEY}(?:, {KEY}, {KEY}, and {KEY})?) mentioned in the provided text\? The "
    r"special magic numbers for \1 mentioned in the provided text are "
)
FORMATS = {
    "single": ONE,
    "multikey": ONE,
    "multivalue": SEVERAL,
    "multiquery": SEVERAL,
    "tracking": (
        r"(?s)Memorize and track the chain\(s\) of variable assignment hidden in the following "
        r"text\.\n\n.+\nQuestion: Find all variables that are assigned the value (\d{5}) in the "
        r"text above\. Answer: According to the chain\(s\) of variable assignment in the text "
        r"above, 5 variables are assigned the value \1, they are: "
    ),
    "frequent": (
        r"Read the following coded text and track the frequency of each coded word\. Find the "
        r"three most frequently appeared coded words\. ((?:(?:[a-z]{6}|\.\.\.) )+\.*)\n"
        r"Question: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. What are "
        r"the three most frequently appeared words in the above coded text\? Answer: According to "
        r"the coded text above, the three most frequently appeared words are: "
    ),
}
LENGTH = 1200


def looked_up(kind: str, text: str) -> list[str]:
    """The answers, by a reader of the text."""
    if kind == "frequent":
        words = re.findall(r"[a-z]{6}(?= )", re.fullmatch(FORMATS[kind], text)[1] + " ")
        return sorted(set(words), key=words.count)[:-4:-1]
    if kind == "tracking":
        of = {b: a for a, b in re.findall(rf"VAR ({VAR}) = (?:VAR )?(\w+)\.", text)}
        chain = [re.search(r"the value (\d+) in", text)[1]]
        while chain[-1] in of:
            chain.append(of[chain[-1]])
        return chain[1:]
    found = re.findall(rf"One of the special magic numbers for ({KEY}) is: ({NUMBER})\.", text)
    asked = re.findall(KEY, re.search(r"What .* for (.*) mentioned in", text)[1].replace("and", ""))
    return [value for key in asked for name, value in found if name == key]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_the_published_format_and_one_answer(kind):
    task = RulerText(kind, LENGTH)
    prompts = task.prompts(0, 1, 3)
    for prompt in prompts:
        assert re.fullmatch(FORMATS[kind], prompt.text)
        assert looked_up(kind, prompt.text) == list(prompt.answers)
        assert len(prompt.text + prompt.answer) == LENGTH
    tokens, mask = task.sample(0, 1, 3)
    for row, scored, prompt in zip(tokens, mask, prompts, strict=True):
        assert bytes(row.astype(np.uint8)).decode() == prompt.text + prompt.answer
        right = bytes(row[1:][scored[:-1] > 0].astype(np.uint8)).decode()
        assert right == "".join(prompt.answers) and not scored[-1]
    assert [p.text for p in prompts] != [p.text for p in task.prompts(0, 2, 3)]


def test_a_model_that_prints_everything_scores_in_the_published_way_only():
    prompt = RulerText("multiquery", LENGTH).prompts(0, 0, 1)[0]
    everything = " ".join(re.findall(NUMBER, prompt.text))
    published = np.mean([answer.lower() in everything.lower() for answer in prompt.answers])
    assert 100 * published == 100 and not prompt.right(everything)
    assert prompt.right(f" {prompt.answer}.") and not prompt.right(f"{prompt.answer}, 1")
    assert Prompt("", ("A", "B"), " ").right("A B") and not prompt.right("")


def test_a_sequence_is_right_when_all_its_tokens_are():
    tokens, mask = RulerWords("multiquery", 64).sample(0, 0, 4)
    guess = np.roll(tokens, -1, axis=1)
    assert exact(guess, tokens, mask) == accuracy(guess, tokens, mask) == 1
    guess[1, np.flatnonzero(mask[1])[0]] = -1
    assert exact(guess, tokens, mask) == 0.75 and accuracy(guess, tokens, mask) == 15 / 16


# A reader of ids: what is asked after the last MARKs.
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "frequent"])
def test_words_state_what_they_ask(kind):
    task = RulerWords(kind, 80, vocab=61)
    for row, scored in zip(*task.sample(2, 3, 20), strict=True):
        asked = {"tracking": 7, "multivalue": 6, "multiquery": 12}.get(kind, 3)
        told, question = row[:-asked].tolist(), row[-asked:].tolist()
        facts = [(told[i + 1], told[i + 2]) for i, x in enumerate(told) if x == 0]
        if kind == "tracking":
            chain = [question[1]]
            while chain[-1] in (of := {value: subject for subject, value in facts}):
                chain.append(of[chain[-1]])
            want = chain[1:]
        else:
            at = [i for i, x in enumerate(question) if x == 0]
            want = [v for i in at for key, v in facts if key == question[i + 1]]
        assert row[1:][scored[:-1] > 0].tolist() == want
        assert len(facts) == task.count + (kind == "tracking")
        assert sum(x >= 41 for x in told) == task.hay == 80 - 3 * len(facts) - asked
    assert task.chance == 1 / 20


def test_the_most_frequent_words_are_asked_for():
    task = RulerWords("frequent", 100)
    for row, scored in zip(*task.sample(0, 0, 10), strict=True):
        words, times = np.unique(row[:-4], return_counts=True)
        rank = words[np.argsort(-times)]
        assert row[-4] == 0 and row[-3:].tolist() == rank[1:4].tolist()
        assert np.flatnonzero(scored).tolist() == [96, 97, 98]


def test_short_needles_are_where_they_should_be_and_their_number_is_scored():
    cells = grid(ByteNeedle(keys=3), (0.0, 0.5, 1.0), (320, 512))
    for (depth, length), task in cells.items():
        prompt = task.prompts(0, 0, 1)[0]
        (answer,) = prompt.answers
        name = re.search(rf"The special magic number for ({KEY}) is: $", prompt.text)[1]
        needle = f"The special magic number for {name} is: {answer}."
        assert prompt.text.count(needle) == 1 and prompt.text.count("The special magic") == 4
        hay = len(prompt.text) - len(needle) + len(answer) + 1
        far = {0.0: (0, 0), 0.5: (0.2, 0.8), 1.0: (0.6, 1)}[depth]
        assert far[0] <= prompt.text.index(needle) / hay <= far[1]
        tokens, mask = task.sample(0, 0, 1)
        assert tokens.shape == (1, length)
        assert np.flatnonzero(mask[0]).tolist() == list(range(length - 8, length - 1))


def test_the_haystack_holds_no_answer():
    hay = ruler_text.haystack().decode()
    assert not re.search(r"\d|VAR|special magic", hay)
    assert len(set(ruler_text.NAMES)) == 32
    assert all(name not in hay and name.capitalize() in hay for name in ruler_text.NAMES)
    # A context longer than the haystack goes on from its start.
    long = ruler_text.with_needles(np.random.default_rng(0), len(hay) + 100, ["x"], 0, 0.0)
    assert long.startswith("x ") and hay[:50] in long and len(long) == len(hay) + 102


GOLDEN = {
    "RulerWords": ([RulerWords(kind, 96) for kind in KINDS], "a6133bec3a68"),
    "RulerText": ([RulerText(kind, LENGTH) for kind in KINDS], "1b74688bd201"),
    "ByteNeedle": ([ByteNeedle(), ByteNeedle(400, 5, 4, 0.5)], "8b34ffeaa4fb"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_samples_stay_what_they_are(name):
    tasks, want = GOLDEN[name]
    samples = b"".join(x.tobytes() for task in tasks for x in task.sample(7, 11, 2))
    assert hashlib.sha256(samples).hexdigest()[:12] == want


def test_a_short_sequence_reads_so():
    (prompt,) = ByteNeedle(160).prompts(0, 0, 1)
    assert prompt.text + prompt.answer == (
        "The special magic number for abraham is: 5730559. O thou daughter dwelling in Egypt, "
        "furnish thyself to go into The special magic number for abraham is: 5730559"
    )


def test_a_byte_task_as_a_corpus():
    data = task_data(ByteNeedle(200, digits=3), train=4, val=2)
    got = data.train.take([0])
    text = data.tokenizer.decode(got["tokens"][0])
    assert re.search(rf"The special magic number for {KEY} is: (\d{{3}})$", text)
    assert data.tokenizer.n_data == 257 and got["weights"][0].nonzero()[0].tolist() == [
        197,
        198,
        199,
    ]


REFUSED = [
    (RulerWords, {"kind": "qa"}, "kind 'qa' is unknown: single, multikey"),
    (RulerWords, {"needles": -1}, "needles=-1 must be at least 1, .*: set needles=1"),
    (RulerWords, {"kind": "multikey", "vocab": 15}, r"// 3 = 4 subjects < needles \+ 1 = 5: set v"),
    (RulerWords, {"kind": "tracking", "length": 22}, "no hay beside 22 words .*: set length=23"),
    (RulerWords, {"kind": "frequent", "length": 20}, "16 words .* set a larger length, or fewer"),
    (
        RulerWords,
        {"kind": "tracking", "depth": 0.5},
        "depth 0.5 .* tracking asks for 4: set depth=",
    ),
    (RulerWords, {"depth": 1.5}, r"depth 1.5 is not in \[0, 1\]"),
    (RulerText, {"length": 300}, "length 300 < .* bytes of the prompt .*: set length=3.. or more"),
    (RulerText, {"kind": "frequent", "needles": 2}, "the prompt asks for 3; set needles=0"),
    (
        RulerText,
        {"kind": "multikey", "needles": 40, "length": 4096},
        "not below 32 names: set needles=31",
    ),
    (ByteNeedle, {"length": 90}, "length 90 < 104 bytes of 1 needle.*: set length=104 or more"),
    (ByteNeedle, {"digits": 0}, "digits=0 must be 1 … 18"),
    (ByteNeedle, {"keys": 33, "length": 4096}, "keys=33 must be 1 … 32, .*: set keys=1"),
]


@pytest.mark.parametrize(("task", "wrong", "message"), REFUSED)
def test_impossible_tasks_name_the_equation_and_a_fix_that_works(task, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        task(**wrong)
    for field, value in re.findall(r"(\w+)=(\d+)", str(error.value).rpartition("set ")[2]):
        fixed = task(**{**wrong, field: int(value)})
        assert fixed.sample(0, 0, 1)[0].shape == (1, fixed.length)
