"""fdp: five-dimensional parallelism research in JAX (tensor, data, pipeline, context, expert)."""
