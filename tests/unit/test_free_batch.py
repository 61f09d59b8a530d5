"""A graph that is exported with a free batch axis keeps this axis for a batch of one row."""

from __future__ import annotations

import torch

from compileflow.source_model.free_batch import free_batch


class Squeezing(torch.nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[:, :1].squeeze() + ids[:, 1:2, None].squeeze()


def test_squeeze_keeps_the_batch_axis_of_one_row() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    with free_batch():
        program = torch.export.export(Squeezing(), (torch.ones(3, 4),), dynamic_shapes=({0: batch},), strict=False)
    assert program.module()(torch.ones(1, 4)).shape == (1,)
    assert program.module()(torch.ones(5, 4)).shape == (5,)
