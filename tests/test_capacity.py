"""What the devices cannot hold is refused with its equation, before anything is allocated."""

from pathlib import Path

import pytest
from build import program, tiny

from configs import topic1, topic2, topic8
from fdp import capacity, config, config_sizes
from fdp.count import memory
from fdp.keys import UserError
from fdp.mesh import make_mesh

pytestmark = pytest.mark.fast
GIB = 2**30


@pytest.mark.parametrize(
    ("made", "key", "value", "words"),
    [
        (topic1, "model.vocab", 2**29, r"parameters and AdamW's moments, 12·\(2·vocab·width"),
        (topic1, "sampling.sequences", 2**28, r"streams of sampling\.sequences, 4·seq"),
        (topic1, "eval.samples", 2**28, r"eval\.samples, .* = 4·268435456·32·64/\(2·1·1\)"),
        (topic1, "train.batch", 2**27, r"the residual streams, 4·batch·seq_len·width"),
        (topic2, "model.moe.experts", 2**24, r"experts and AdamW's moments, 12·layers·experts·3"),
        (topic2, "model.moe.shared", 2**22, "shared experts and AdamW's moments"),
        (topic2, "router.sequences", 2**28, r"streams of router\.sequences"),
        (topic8, "model.image.channels", 2**24, r"the images of train\.batch, 4·batch·size²·chan"),
        (topic8, "images.references", 2**28, r"the images of images\.references"),
    ],
)
def test_what_the_free_memory_cannot_hold_is_refused(made, key, value, words, monkeypatch) -> None:
    monkeypatch.setattr(capacity, "host_free", lambda: 80.0 * GIB)
    c = made.get_config("tiny")
    mesh = make_mesh(c.mesh)
    capacity.check(c, mesh)
    c.update_from_flattened_dict({key: value})
    config.validate(c)  # some machine may hold it
    said = rf"{words}.* a device, exceed the 10 GiB of this machine's memory that are free for each"
    with pytest.raises(UserError, match=rf"{said} of 8 virtual devices: lower .*{key}"):
        capacity.check(c, mesh)


TP_DP = {"mesh.tp": 2, "mesh.dp": 2, "train.zero": 3}
# Stages that share the output head.
HEAD = {"mesh.pp": 2, "pipeline.vocabulary": True, "train.microbatches": 4, "model.vocab": 4096}


@pytest.mark.parametrize(
    "keys",
    [
        *(
            {**degrees, **more}
            for degrees in ({}, TP_DP)
            for more in ({}, {"model.tied": True}, {"model.conv": 4}, {"model.moe.experts": 4})
        ),
        HEAD,
    ],
)
def test_the_bytes_of_the_state_are_at_most_those_counted(keys) -> None:
    """A bound that is too high would refuse what fits."""
    c = tiny(**keys)
    counted = memory.estimate(program(c))
    held = counted.parameters + counted.optimizer
    bound = sum(size.count for size in config_sizes.sizes(c) if "moments" in size.what)
    assert 0.7 * held < bound <= held


def test_memory_is_that_of_the_system_and_of_its_container(tmp_path: Path) -> None:
    assert 0 < capacity.host_free() < 2**60
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert capacity._system(tmp_path / "meminfo") == 2**21
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity._group(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert capacity._group(tmp_path) == 600
    # Files that were read before are no reason to refuse: they give way.
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200\nactive_file 50\n")
    assert capacity._group(tmp_path) == 850
