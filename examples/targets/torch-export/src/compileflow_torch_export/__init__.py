"""A target for compileflow: models as torch.export programs."""
