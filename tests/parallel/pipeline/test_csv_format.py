"""The CSV of torch.distributed.pipelining: round trips, errors, torch itself where installed."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.parallel.pipeline.csv_format import read_csv, write_csv
from fdp.parallel.pipeline.fixed import (
    dualpipe_v,
    gpipe,
    interleaved,
    interleaved_zero_bubble,
    one_f_one_b,
    zb_h1,
    zbv,
)
from fdp.parallel.pipeline.orders import Op, Order, recompute
from fdp.parallel.pipeline.placement import looped

pytestmark = pytest.mark.fast


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([gpipe, one_f_one_b, zb_h1, zbv, lambda p, m: interleaved(p, p * m, 3)]),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_what_is_written_is_read(tmp_path_factory, build, p, m):
    path = tmp_path_factory.mktemp("csv") / "schedule.csv"
    order = build(p, m)
    write_csv(order, path)
    assert read_csv(path, p=p) == order


def test_cells_by_hand(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(zb_h1(2, 2), path)
    assert path.read_text().split() == ["0F0,0F1,0I0,0W0,0I1,0W1", "1F0,1I0,1F1,1I1,1W0,1W1"]
    path.write_text("0F0, ,0SEND_F0,0RECV_B0,0B0,\n0UNSHARD,,1F0,1B0,\n")
    assert read_csv(path) == gpipe(2, 1)
    path.write_text("0F0,1F0,(0F1;1B0)OVERLAP_F_B,1F1,(0B0;1B1)OVERLAP_F_B,0B1\n")
    names = " ".join(f"{op.kind}{op.microbatch}.{op.chunk}" for op in read_csv(path).ops[0])
    assert names == "F0.0 F0.1 F1.0 BW0.1 F1.1 BW0.0 BW1.1 BW1.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0\n", "rank 0, cell 1: '0X0' is no action"),
        ("0F0,0B\n", "rank 0, cell 1: '0B' is no action"),
        ("0F0,0B0\n0F0,1B0\n", "rank 1, cell 0: 0F0: virtual stage 0 is on rank 0 already"),
        ("0F0,0B0\n2F0,2B0\n", r"virtual stages \[1\] of 3 have no cell"),
        ("0F0,0B0\n,\n", "rank 1 runs nothing"),
        ("", "x.csv has no cell: write one line a rank"),
        ("0F99999999\n1F0\n", "2 virtual stages of 100000000 microbatches in 2 cells"),
        ("0F0\n999999999F0\n", "1000000000 virtual stages of 1 microbatches in 2 cells"),
        ("0F" + "9" * 5000, "x.csv: .* digits"),
        ("x" * 200_000, "is no CSV file: field larger than field limit"),
        ("0F0,0B0,2F0\n1F0\n", r"virtual stages per device: \[2, 1\]"),
    ],
)
def test_bad_cells(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(path)


def test_bytes_of_other_programs(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbf0F0,0B0\r\n1F0,1B0\r\n")  # the mark of a spreadsheet
    assert read_csv(path) == gpipe(2, 1)
    path.write_bytes(b"\0\xff\xfe")
    with pytest.raises(ValueError, match=r"x.csv is no CSV file: .*0xff"):
        read_csv(path)


def test_other_numbers_than_asked_for(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(zbv(2, 2), path)
    with pytest.raises(ValueError, match="has 2 ranks, not p=4"):
        read_csv(path, p=4)
    with pytest.raises(ValueError, match=r"stage 0, row 1: R0 .* has F, B, W and BW only"):
        write_csv(recompute(gpipe(1, 1)), path)
    with pytest.raises(ValueError, match="never runs"):
        write_csv(Order(looped(1), ((Op("F", 0),),)), path)


NAMES = {
    "Interleaved1F1B": lambda p, m: interleaved(p, m, 2),
    "InterleavedZeroBubble": lambda p, m: interleaved_zero_bubble(p, m, 2),
    "ZBVZeroBubble": zbv,
    "DualPipeV": dualpipe_v,
}


@pytest.mark.parametrize("name", NAMES)
def test_torch_has_these_orders_and_reads_this_file(tmp_path, name):
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    for p, m in ((2, 4), (4, 12), (8, 16)):
        path = tmp_path / "theirs.csv"
        with path.open("w", newline="") as file:
            for rank in visualizer.get_schedule_ops(name, p, m, 2):
                csv.writer(file).writerow(["" if cell is None else cell for cell in rank])
        order = NAMES[name](p, m)
        assert read_csv(path, p=p) == order
        write_csv(order, path)
        with path.open(newline="") as file:
            cells = {
                i: [schedules._Action.from_str(cell) for cell in row]
                for i, row in enumerate(csv.reader(file))
            }
        ranks = schedules._validate_schedule(cells, p, 2 * p, m)
        assert tuple(ranks[u] for u in range(2 * p)) == order.placement.devices
