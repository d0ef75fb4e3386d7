"""Models, jobs and points that the tests of the planner share."""

from dataclasses import replace

from fdp.price import space
from fdp.price.hardware import cluster
from fdp.price.shapes import named
from fdp.price.workload import Job, job_on

SMALL = replace(
    named("llama3-8b"),
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


def job_of(name_or_shape, text, batch=1024, seq=4096, precision="bf16"):
    a = named(name_or_shape) if isinstance(name_or_shape, str) else name_or_shape
    here = cluster(text)
    return job_on(a, here, batch, seq, precision), here


def with_plan(job: Job, **changes: object) -> Job:
    """The job with some fields of its plan changed."""
    return replace(job, plan=replace(job.plan, **changes))


def tuples(points):
    return list(zip(*(points[k].tolist() for k in space.KEYS), strict=True))
