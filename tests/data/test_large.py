"""A corpus of 200 MB: what it takes of memory, and how fast a second run starts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fdp.data import text
from fdp.data.shards import size

MEASURED = """
import json, re, sys, time
from pathlib import Path
started = time.monotonic()
from fdp.data.batches import batch, load_text
data = load_text(sys.argv[1], "bpe", 1024, 512, 0.01, 0, sys.argv[2])
total = sum(int(batch(data.train, step, 64, 0)["tokens"].sum()) for step in range(20))
# ru_maxrss would count what the process that started this one holds.
kilobytes = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([time.monotonic() - started, kilobytes * 1024, len(data.train), total]))
"""


def prose(n_bytes: int, seed: int) -> str:
    """Sentences of 50,000 made-up words, some of them frequent, in paragraphs."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(97, 123, (50_000, 9), np.uint8)
    words = [bytes(row[: 2 + i % 8]).decode() for i, row in enumerate(letters)]
    parts, size = [], 0
    while size < n_bytes:
        drawn = [words[i] for i in np.minimum(rng.zipf(1.2, 100_000) - 1, 49_999)]
        rows = [" ".join(drawn[i : i + 80]) + "." for i in range(0, len(drawn), 80)]
        parts.append("\n\n".join(rows))
        size += len(parts[-1]) + 2
    return "\n\n".join(parts)


def large_folder(folder: Path) -> None:
    """200 MB: one file of 50 MB, 2,500 small ones, JSON lines, and one line without an end."""
    folder.mkdir()
    texts = [prose(50_000_000, seed) for seed in range(4)]
    (folder / "a.txt").write_text(texts[0])
    for i in range(0, len(texts[1]), 20_000):
        (folder / f"b{i:09}.txt").write_text(texts[1][i : i + 20_000])
    with open(folder / "c.jsonl", "w") as file:
        for i in range(0, len(texts[2]), 3000):
            file.write(json.dumps({"text": texts[2][i : i + 3000]}) + "\n")
    (folder / "d.txt").write_text(texts[3].replace("\n\n", " "))


@pytest.mark.slow
def test_200_mb_take_less_than_a_gigabyte_and_start_again_within_5_s(tmp_path):
    large_folder(tmp_path / "folder")
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "folder"), str(tmp_path / "cache")]
    found = []
    for _ in range(2):
        time.sleep(text.SETTLED + 0.1)  # the files are older than that
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    (seconds, first_bytes, *first), (again, bytes_again, *second) = found
    print(f"first {seconds:.0f} s, {size(first_bytes)}; again {again:.1f} s, {size(bytes_again)}")
    assert first == second and first[0] > 100_000
    assert first_bytes <= 1e9 and bytes_again <= 1e9
    assert again <= 5
