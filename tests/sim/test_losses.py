"""What the losses of a whole model keep for their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from aimet_quadapter.sim.losses import _divergence
from aimet_quadapter.sim.outputs import ROWS_AT_ONCE


def test_no_probabilities_are_kept_for_the_gradient_of_a_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, ROWS_AT_ONCE + 3, 11)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    student.requires_grad_()
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = _divergence(student, teacher)
    given = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    more = [x for x in kept if x.untyped_storage().data_ptr() not in given]
    assert [x.shape for x in more if x.numel() > found.numel()] == []
    q, p = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1))
    found.sum().backward()
    torch.testing.assert_close(student.grad, (q - p).detach())
