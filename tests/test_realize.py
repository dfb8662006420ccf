"""What the compiler must compute before it goes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fasa_flex.core.compiler import compute_once, realize


def test_realize_is_a_contiguous_copy() -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    copy = realize(tensor)
    assert copy.equal(tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() != tensor.data_ptr()
    fake = realize(tensor.to("meta"))
    assert (fake.shape, fake.stride()) == (copy.shape, copy.stride())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_what_is_computed_once_is_a_buffer_for_what_reads_it_often() -> None:
    """Without it Inductor takes the cosine anew for each of 1000 rows."""
    table, angles = torch.randn(1000, 7), torch.randn(7)

    def once(angles: Tensor) -> Tensor:
        return (compute_once(angles.cos()) * table).sum(1)

    out, (code,) = run_and_get_code(torch.compile(once), angles)
    torch.testing.assert_close(out, (angles.cos() * table).sum(1))
    assert "empty_strided_cpu((7, ), (1, )" in code
    torch._dynamo.reset()
    _, (inlined,) = run_and_get_code(torch.compile(lambda angles: (angles.cos() * table).sum(1)), angles)
    assert "empty_strided_cpu((7, ), (1, )" not in inlined
