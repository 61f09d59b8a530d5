"""What the targets of AWS Neuron, BladeDISC and HyperDex share."""
