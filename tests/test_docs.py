"""Pages that are generated say what the code says; links lead somewhere."""

import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from fdp import config
from fdp.count.counts import REDUCE
from fdp.mesh import AXES
from fdp.parallel.expert.exchange import Load
from fdp.parallel.expert.plan import Dispatch
from fdp.price import moe
from tools import write_docs

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("fdp/topics/*/*.md"))
EXPERTS = (ROOT / "docs" / "experts.md").read_text(encoding="utf8")


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


@pytest.mark.parametrize("buffer", [0.0, 1.5])
def test_bytes_of_dispatch_plans_are_what_the_page_says(buffer: float) -> None:
    """Every formula in backticks is evaluated where K exceeds the experts of a device."""
    page = EXPERTS.partition("## What does not go over ep")[0]
    plans = re.findall(r"^\| (\w+) \| .* \| `(.+)` \| `(.+)` \|$", page, re.MULTILINE)
    held = re.findall(r"^\| (\w+) \| `(.+)` \| `(.+)` \|$", page, re.MULTILINE)
    asked = re.findall(r"`(2·\(S-1\)/S[^`]+)`", page)
    assert [p[0] for p in plans] == ["flat", "two_level", "gather"] and len(asked) == 2
    T, K, E, S, G, D, b = 64, 4, 16, 8, 2, 8, 4
    names: dict[str, Any] = {"min": min, "ceil": math.ceil, "β": buffer, "w": D * b}
    names |= {"T": T, "K": K, "E": E, "S": S, "G": G, "M": S // G, "e": E // S, "D": D, "b": b}

    def value(formula: str) -> float:
        return eval(formula.replace("·", "*"), {}, names)

    for name, enough, tight in held:
        names[name] = value(tight if buffer else enough)
    ids: Any = jax.ShapeDtypeStruct((T, K), jnp.int32)
    load = Load(ids, ids, T * K, T, E)
    for name, *ways in plans:
        plan = Dispatch(name, G if name == "two_level" else 1, buffer=buffer)
        sent = plan.sent(T, load, (D, b), dict.fromkeys(AXES, 1) | {"ep": S})
        checked = sent[0].pop((REDUCE, ("ep",)), 0)
        assert checked == (value(asked[name == "two_level"]) if buffer else 0)
        assert [sum(s.values()) for s in sent] == [value(f) for f in ways], name


def test_prices_of_dispatch_plans_are_what_the_commands_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quoted = re.findall(r"```\n\$ python -m fdp\.price\.moe (.+)\n([^`]+)```", EXPERTS)
    assert len(quoted) == 3
    for args, table in quoted:
        values = flags.FlagValues()
        moe.declare(values)
        moe.run(values, values(["moe", *args.split()])[1:])
        assert capsys.readouterr().out == table


def test_keys_of_experts_are_those_of_the_config() -> None:
    keys = set(re.findall(r"model\.moe\.(\w+)", EXPERTS))
    assert keys <= set(config.base().model.moe.keys()) and len(keys) > 15
