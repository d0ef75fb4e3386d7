"""Start a run on one machine or on a cluster."""
