"""Pages that are generated say what the code says; links lead somewhere."""

import re
from pathlib import Path

import pytest

from tools import write_docs

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("fdp/topics/*/*.md"))


def test_generated_pages_are_current() -> None:
    for path, text in write_docs.pages().items():
        assert path.read_text(encoding="utf8") == text, "run python -m tools.write_docs"


def test_links_and_pictures_are_there() -> None:
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf8")):
            if not target.startswith("http") and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert not missing


def test_the_counts_of_claims_are_those_of_the_published_tables() -> None:
    rows = re.findall(
        r"^\| \d+ \[\w+\]\((.+)/README.md\) .*\| (\d+) \| (\d+) \|$",
        (ROOT / "README.md").read_text(encoding="utf8"),
        re.MULTILINE,
    )
    assert len(rows) == len(list(ROOT.glob("configs/topic*.py")))
    for folder, held, failed in rows:
        page = ROOT / folder / "results.md"
        table = (page if page.exists() else ROOT / folder / "README.md").read_text(encoding="utf8")
        found = [
            len(re.findall(rf"\| \W*{word}\W*(?:, interval crosses)? \|", table))
            for word in ("holds", "fails")
        ]
        assert found == [int(held), int(failed)], folder
