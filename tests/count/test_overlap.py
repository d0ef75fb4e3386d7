"""What stands between start and done of a collective, in hand-made schedules."""

import pytest

from fdp.count import aot, experts
from fdp.count.overlap import Overlap, overlap

WHERE = 'channel_id=1, replica_groups={{0,1}}, metadata={op_name="jit(f)/moved"}'
START = f"  %s = (f32[8], f32[8]) ragged-all-to-all-start(%x, %y, %a, %b, %c, %d), {WHERE}"
DONE = "  %e = f32[8] ragged-all-to-all-done(%s)"
SYNC = f'{START}, backend_config={{"collective_backend_config":{{"is_sync":true}}}}'
BLOCKING = f"  %s = f32[8] ragged-all-to-all(%x, %y, %a, %b, %c, %d), {WHERE}"
WRAPPED = "  %s = ((f32[8]), f32[8]) async-start(%x), calls=%wrapped"
INNER = f"""%wrapped (q: f32[8]) -> f32[8] {{
  %q = f32[8] parameter(0)
  ROOT %r = f32[8] ragged-all-to-all(%q, %q, %q, %q, %q, %q), {WHERE}
}}
"""
ADD = "  %g = f32[8] add(%x, %x)"
OTHER = "  %h = f32[8] fusion(%x), kind=kOutput, calls=%mine"
SHARED = "  %i = f32[8] fusion(%x), kind=kOutput, calls=%ours"
DEPENDS = "  %j = f32[8] fusion(%e), kind=kOutput, calls=%ours"


def product(name: str, scope: str) -> str:
    op = f'op_name="jit(f)/transpose(jvp({scope}))/dot_general"'
    return f"""%{name} (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %d = f32[8] dot(%p, %p), metadata={{{op}}}
}}
"""


def text(*lines: str) -> str:
    body = "\n".join(lines)
    return f"""HloModule m, is_scheduled=true
{product("ours", "shared")}
{product("mine", "unshared")}
{INNER if WRAPPED in lines else ""}
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
{body}
  ROOT %z = f32[8] add(%x, %x)
}}
"""


@pytest.mark.fast
@pytest.mark.parametrize(
    ("lines", "want"),
    [
        ((START, SHARED, DONE), (1, 1, 1, 1)),
        ((START, OTHER, DONE, DEPENDS), (1, 1, 1, 0)),
        ((SHARED, START, ADD, DONE), (1, 1, 0, 0)),
        ((SYNC, SHARED, DONE), (1, 0, 0, 0)),
        ((BLOCKING, SHARED), (1, 0, 0, 0)),
        ((WRAPPED, SHARED, "  %u = f32[8] async-done(%s)"), (1, 1, 1, 1)),
        ((SHARED, OTHER), (0, 0, 0, 0)),
    ],
    ids=["shared", "other", "nothing", "synchronous", "blocking", "wrapped", "none"],
)
def test_what_stands_between_is_told(lines: tuple[str, ...], want: tuple[int, ...]) -> None:
    assert overlap(text(*lines), "ragged-all-to-all", "shared") == Overlap(*want)


@pytest.mark.aot
def test_shared_experts_stand_between_start_and_done_on_an_h100() -> None:
    """Two levels there and back, forward and backward: eight moves, and each pass hides one."""
    text = aot.compile(experts.exchange("h100:2x8")).as_text()
    found = overlap(text, "ragged-all-to-all", "shared")
    assert found.total == 8 and found.total > found.apart >= found.busy >= found.beside == 2
    assert overlap(text, "ragged-all-to-all", "unshared").beside == 0
