"""What Prefect adds to a run of the library: the parts of exp_flow_overhead.py."""
