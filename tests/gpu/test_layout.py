"""Tile order: repack, its inverse, and the dense weights made from it."""

import pytest
import torch
from gpu_layers import make_layer

ops = torch.ops.grinqh


@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4), (8,), (1, 1)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (256, 64), (300, 77), (1000, 5)])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_unpack_tiles_is_the_inverse_of_repack(widths: tuple[int, ...], n: int, k: int, block: int) -> None:
    channels = tuple(max(0, k - 3 * p) for p in range(len(widths)))
    layer = make_layer(n, k, widths, block, channels)
    tiled = layer.cuda()
    planes, scale = ops.unpack_tiles(tiled.planes, tiled.block_scale, list(widths), n, block)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(planes, layer.planes, strict=True))
    assert torch.equal(scale.cpu(), layer.block_scale)


@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4), (8,)], ids=str)
def test_fake_kernels_know_the_shapes_of_tile_order(widths: tuple[int, ...]) -> None:
    layer = make_layer(300, 77, widths)
    canonical = ([plane.cuda() for plane in layer.planes], layer.block_scale.cuda())
    tiled = layer.cuda()
    rest = (list(widths), 300, layer.block)
    torch.library.opcheck(ops.repack.default, (*canonical, *rest))
    torch.library.opcheck(ops.unpack_tiles.default, (tiled.planes, tiled.block_scale, *rest))


@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4), (8,), (1, 2, 4), (2, 2), (1,) * 8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (256, 64), (300, 77), (520, 40), (1000, 130)])
def test_dequantize_gives_the_bits_of_the_cpu(widths: tuple[int, ...], dtype: torch.dtype, n: int, k: int) -> None:
    channels = tuple(max(0, k - 3 * p) for p in range(len(widths)))
    for block in (32, 64, 128):
        layer = make_layer(n, k, widths, block, channels)
        tiled = layer.cuda()
        for grade in range(len(widths) + 1):
            dense = ops.dequantize(*tiled.weight(), grade, dtype)
            assert torch.equal(dense.cpu(), ops.dequantize(*layer.weight(), grade, dtype))
