"""Models, jobs and points that the tests of the planner share."""

from dataclasses import replace

from fdp.cost.architecture import architecture
from fdp.cost.hardware import cluster
from fdp.topics.parallelism_search import plan as planner

SMALL = replace(
    architecture("llama3-8b"),
    name="small",
    layers=6,
    heads=8,
    kv_heads=2,
    head_dim=64,
    width=512,
    ffn=1024,
    vocab=4096,
)
EXPERTS = replace(SMALL, name="experts", experts=8, topk=2, moe_ffn=512, first_dense=2)


def job_of(name_or_architecture, text, batch=1024, seq=4096, precision="bf16"):
    a = (
        architecture(name_or_architecture)
        if isinstance(name_or_architecture, str)
        else name_or_architecture
    )
    here = cluster(text)
    return planner.job_on(a, here, batch, seq, precision), here


def tuples(points):
    return list(zip(*(points[k].tolist() for k in planner.KEYS), strict=True))
