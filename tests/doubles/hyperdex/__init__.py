"""Double of the HyperDex toolchain: `hyperdex.tools` compiles, `hyperdex.transformers` runs."""
