"""Fetching the beginning of the next layer: the same bits, and errors for tensors that are none."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import make_layer, make_x

ops = torch.ops.grinqh
ROWS = 16  # max_graded_rows


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (320, 512), (20000, 300)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_results_are_bit_equal_whatever_comes_next(n: int, k: int, rows: int) -> None:
    layer, after, x = make_layer(200, 300).cuda(), make_layer(n, k).cuda(), make_x(rows, 300, torch.float16).cuda()
    first = [after.planes[0], after.block_scale, after.channel_order, after.channel_weight]
    arguments = (x, *layer.arguments())
    arguments += (None,) * (12 - len(arguments))
    wanted = ops.linear(*arguments, ROWS)
    assert torch.equal(ops.linear_prefetch(*arguments, ROWS, first), wanted)
    assert torch.equal(ops.linear_prefetch(*arguments, ROWS, []), wanted)
    torch.cuda.synchronize()


def test_what_is_no_layer_is_refused_by_name() -> None:
    layer, x = make_layer(200, 300).cuda(), make_x(1, 300, torch.float16).cuda()
    arguments = (x, *layer.arguments())
    arguments += (None,) * (12 - len(arguments))
    with pytest.raises(RuntimeError, match="next has 1 tensors"):
        ops.linear_prefetch(*arguments, ROWS, [layer.planes[0]])
    with pytest.raises(RuntimeError, match=r"next\[3\] is on cpu"):
        first = [layer.planes[0], layer.block_scale, layer.channel_order, layer.channel_weight.cpu()]
        ops.linear_prefetch(*arguments, ROWS, first)
