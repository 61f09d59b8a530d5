"""Doubles of vendors' toolchains: their documented signatures and flags, real torch.jit graphs behind them.

They check the contract, not the arithmetic: whatever precision is asked for, torch computes in fp32 on the CPU.
What the vendor's documentation does not name is refused. `fixtures.vendor_doubles` puts them on sys.path.
"""
