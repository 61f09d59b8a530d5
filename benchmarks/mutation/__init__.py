"""Error rate of the gates: faults that are planted on purpose must fail, and honest compiles must pass."""
