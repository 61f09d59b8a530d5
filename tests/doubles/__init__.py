"""Doubles of the vendors' toolchains: the documented signatures and flags, with real torch.jit graphs behind them.

They check the contract but not the arithmetic: torch computes in fp32 on the CPU at every precision. They refuse
everything that the vendor's documentation does not name. `fixtures.vendor_doubles` puts them on sys.path.
"""
