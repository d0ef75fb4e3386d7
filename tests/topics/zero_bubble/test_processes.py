"""The simulator against a real run, in small: numbers of a busy machine are not judged."""

import json

from fdp.topics.zero_bubble.processes import KINDS, SHAPE, DiTStage, measured, orders

SMALL = {
    **SHAPE,
    "model.layers": 4,
    "model.width": 16,
    "model.heads": 1,
    "model.kv_heads": 1,
    "model.head_dim": 16,
    "model.ffn": 16,
    "model.image.size": 4,
}


def test_stages_in_processes_compute_the_same_in_either_order():
    some = orders(3)
    found = measured({name: some[name] for name in ("ZBV", "wave")}, DiTStage(SMALL, 1), 2, 60.0)
    assert json.loads(json.dumps(found)) == found
    zbv, wave = found["rows"]
    for name in ("loss", "squares"):
        assert zbv[name] > 0 and abs(zbv[name] / wave[name] - 1) < 1e-5
    assert [len(wave["costs"][kind]) for kind in KINDS] == [4, 4, 4]
    assert all(row["simulated"] > 0 and len(row["measured"]) == 2 for row in found["rows"])
