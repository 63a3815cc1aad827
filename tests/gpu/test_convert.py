"""Conversion on the GPU gives the bits of the CPU."""

import pytest
import torch

ops = torch.ops.grinqh

SIZES = [(1, 1), (7, 33), (576, 200), (300, 1536), (4099, 65)]


def make_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Gaussian, with a row and a column of zeros, a large column and two equal ones."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5
    if min(n, k) > 4:
        weight[2] = 0
        weight[:, 0] *= 100
        weight[:, 1] = 0
        weight[:, 3] = weight[:, 4]
    return weight


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_sort_channels_gives_the_order_of_the_cpu(n: int, k: int, weighted: bool) -> None:
    weight = make_weight(n, k)
    square = torch.rand(k, generator=torch.Generator().manual_seed(1)) if weighted else None
    order = ops.sort_channels(weight.cuda(), None if square is None else square.cuda())
    assert torch.equal(order.cpu(), ops.sort_channels(weight, square))


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_quantize_gives_the_bits_of_the_cpu(n: int, k: int, block: int) -> None:
    weight = make_weight(n, k)
    order = ops.sort_channels(weight, None)
    for got, wanted in zip(
        ops.quantize(weight.cuda(), order.cuda(), block), ops.quantize(weight, order, block), strict=True
    ):
        assert got.dtype == wanted.dtype
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4), (8,), (1,) * 8, (4, 2)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (300, 77)])
def test_pack_and_unpack_give_the_bits_of_the_cpu(widths: tuple[int, ...], n: int, k: int) -> None:
    codes = torch.randint(0, 256, (k, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    channels = [max(0, k - 3 * p) for p in range(len(widths))]
    planes = ops.pack(codes.cuda(), list(widths), channels)
    wanted = ops.pack(codes, list(widths), channels)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(planes, wanted, strict=True))
    assert torch.equal(ops.unpack(planes, list(widths), n, k).cpu(), ops.unpack(wanted, list(widths), n, k))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = make_weight(40, 50)
    weight[11, 22] = value
    with pytest.raises(RuntimeError, match="column 22"):
        ops.sort_channels(weight.cuda(), None)
    with pytest.raises(RuntimeError, match="row 11"):
        ops.quantize(weight.cuda(), torch.arange(50, dtype=torch.int32, device="cuda"), 64)


@pytest.mark.parametrize("wrong", [-1, 50, 3])
def test_an_order_that_is_no_permutation_is_refused(wrong: int) -> None:
    order = torch.arange(50, dtype=torch.int32)
    order[7] = wrong
    with pytest.raises(RuntimeError, match=r"channel_order\[\d\] is no new number of 0 to 49"):
        ops.quantize(make_weight(40, 50).cuda(), order.cuda(), 64)


def test_a_mean_square_that_is_negative_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"mean_square\[5\]"):
        ops.sort_channels(make_weight(4, 9).cuda(), torch.tensor([1.0] * 5 + [-1.0] + [2.0] * 3).cuda())
