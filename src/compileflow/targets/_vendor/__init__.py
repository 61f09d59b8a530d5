"""Code that the targets of AWS Neuron, BladeDISC and HyperDex share."""
