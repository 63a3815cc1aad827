"""grinqh._core: the core for NumPy arrays. The references here are written from cpp/include/grinqh/format.h."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from grinqh import _core

FINE = [2, 1, 1, 2, 2]
EQUAL = [2, 2, 2, 2]


@dataclass(frozen=True)
class Layer:
    """A packed layer, by the names of the arguments that take it, and the codes it was packed from."""

    codes: NDArray[np.uint8]
    planes: list[NDArray[np.uint8]]
    block_scale: NDArray[np.float16]
    row_scale: NDArray[np.float32]
    gain: NDArray[np.float32]
    channel_order: NDArray[np.int32]
    channel_weight: NDArray[np.float32]
    thresholds: NDArray[np.float32]
    widths: list[int]
    block: int

    def packed(self) -> dict[str, Any]:
        names = ["planes", "block_scale", "row_scale", "gain", "channel_order", "widths", "block"]
        return {name: getattr(self, name) for name in names}

    def grading(self) -> dict[str, Any]:
        return {"channel_weight": self.channel_weight, "thresholds": self.thresholds}


def make_weight(n: int, k: int) -> NDArray[np.float32]:
    return np.random.default_rng(n * 10007 + k).standard_normal((n, k), dtype=np.float32)


def make_layer(n: int = 70, k: int = 33, widths: list[int] = FINE, block: int = 32, stored: float = 1.0) -> Layer:
    """A layer whose plane p is stored for the share stored**p of the channels."""
    weight = make_weight(n, k)
    order = _core.sort_channels(weight)
    codes, block_scale, row_scale, gain, _ = _core.quantize(weight, order, block)
    planes = _core.pack(codes, widths, [int(k * stored**p) for p in range(len(widths))])
    rng = np.random.default_rng(0)
    return Layer(
        codes=codes,
        planes=planes,
        block_scale=block_scale,
        row_scale=row_scale,
        gain=gain[np.cumsum(widths)],
        channel_order=order,
        channel_weight=rng.uniform(0.5, 2.0, k).astype(np.float32),
        thresholds=np.linspace(0.2, 1.6, len(widths), dtype=np.float32),
        widths=widths,
        block=block,
    )


def stored_planes(layer: Layer) -> NDArray[np.int64]:
    """int64 [K], how many planes hold each stored channel."""
    lengths = np.array([len(plane) for plane in layer.planes])
    counts: NDArray[np.int64] = (np.arange(len(layer.channel_order))[:, None] < lengths).sum(axis=1)
    return counts


def reference_grades(layer: Layer, x: NDArray[Any]) -> NDArray[np.int64]:
    importance = np.abs(x[:, layer.channel_order].astype(np.float32)) * layer.channel_weight
    grades = (importance[:, :, None] >= layer.thresholds).sum(axis=2)
    result: NDArray[np.int64] = np.minimum(grades, stored_planes(layer))
    return result


def reference_weight(layer: Layer, grades: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [K, N] of the stored channels, each at its grade."""
    bits = np.concatenate([[0], np.cumsum(layer.widths)])[grades][:, None]
    gain = np.concatenate([[0.0], layer.gain.astype(np.float64)])[grades][:, None]
    level = (2 * (layer.codes >> (8 - bits)) + 1) / 2.0**bits - 1
    scale = np.repeat(layer.block_scale.astype(np.float64), layer.block, axis=1)[:, : layer.codes.shape[1]]
    weight: NDArray[np.float64] = gain * layer.row_scale.astype(np.float64) * scale * level
    return weight


def reference_gemv(layer: Layer, x: NDArray[Any]) -> NDArray[np.float64]:
    ordered = x[:, layer.channel_order].astype(np.float64)
    rows = zip(ordered, reference_grades(layer, x), strict=True)
    return np.stack([row @ reference_weight(layer, grades) for row, grades in rows])


def make_x(m: int, k: int, dtype: str = "float32") -> NDArray[Any]:
    return np.random.default_rng(m).standard_normal((m, k)).astype(dtype)


@pytest.fixture
def threads() -> Iterator[None]:
    before = _core.num_threads()
    yield
    _core.set_num_threads(before)


def test_import_of_the_package_does_not_import_the_module() -> None:
    program = "import sys, grinqh; sys.exit('grinqh._core' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False).returncode == 0


def test_the_module_works_where_torch_is_not_installed() -> None:
    program = "import sys; sys.modules['torch'] = None; from grinqh import _core; _core.sort_channels([])"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert "TypeError: sort_channels()" in done.stderr


def test_channels_are_sorted_by_falling_mean_square_times_energy_with_ties_by_index() -> None:
    weight = make_weight(9, 40)
    weight[:, 17] = weight[:, 3]
    mean_square = np.random.default_rng(1).uniform(0, 3, 40).astype(np.float32)
    mean_square[17] = mean_square[3]
    importance = (weight.astype(np.float64) ** 2).sum(axis=0) * mean_square
    expected = np.argsort(-importance, kind="stable")
    np.testing.assert_array_equal(_core.sort_channels(weight, mean_square), expected)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_codes_are_the_mid_rise_codes_of_their_scale(block: int) -> None:
    weight = make_weight(133, 21)
    order = _core.sort_channels(weight)
    codes, block_scale, row_scale, _, _ = _core.quantize(weight, order, block)
    scale = np.repeat(block_scale.astype(np.float32), block, axis=1)[:, :133] * row_scale
    expected = np.clip(np.floor(weight.T[order] / scale * np.float32(128)) + 128, 0, 255)
    np.testing.assert_array_equal(codes, expected)


def test_gain_is_least_squares_and_the_error_is_what_it_leaves() -> None:
    weight = make_weight(64, 16)
    order = _core.sort_channels(weight)
    codes, block_scale, row_scale, gain, channel_error = _core.quantize(weight, order, 64)
    target = weight.T[order].astype(np.float64)
    assert gain[0] == 0
    np.testing.assert_allclose(channel_error[0], (target**2).mean(axis=1), rtol=1e-5)
    for bits in range(1, 9):
        level = (2 * (codes >> (8 - bits)).astype(np.float64) + 1) / 2.0**bits - 1
        value = level * np.repeat(block_scale.astype(np.float64), 64, axis=1) * row_scale
        np.testing.assert_allclose(gain[bits], (target * value).sum() / (value**2).sum(), rtol=1e-5)
        error = ((target - gain[bits] * value) ** 2).mean(axis=1)
        np.testing.assert_allclose(channel_error[bits], error, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("widths", [FINE, EQUAL, [8], [4, 4], [1] * 8, [2, 1]])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (65, 3), (576, 5)])
def test_unpack_gives_back_the_bits_that_pack_stored(widths: list[int], n: int, k: int) -> None:
    codes = np.random.default_rng(n).integers(0, 256, (k, n), dtype=np.uint8)
    channels = [max(0, k - p) for p in range(len(widths))]
    planes = _core.pack(codes, widths, channels)
    assert [plane.shape for plane in planes] == [
        (stored, -(-n * width // 8)) for stored, width in zip(channels, widths, strict=True)
    ]
    bits_stored = (np.arange(k)[:, None] < np.array(channels)) @ np.array(widths)
    mask = (0xFF00 >> bits_stored).astype(np.uint8)[:, None]
    np.testing.assert_array_equal(_core.unpack(planes, widths, n, k), codes & mask)


@pytest.mark.parametrize("grade", range(6))
def test_dequantize_gives_input_features_at_the_grade_or_the_last_stored(grade: int) -> None:
    layer = make_layer(stored=0.8)
    expected = np.empty((33, 70))
    expected[layer.channel_order] = reference_weight(layer, np.minimum(grade, stored_planes(layer)))
    np.testing.assert_allclose(_core.dequantize(**layer.packed(), grade=grade), expected, rtol=1e-5, atol=1e-7)
    half = _core.dequantize(**layer.packed(), grade=grade, dtype="float16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("stored", [1.0, 0.7])
def test_grades_count_the_thresholds_at_or_below_the_importance(stored: float) -> None:
    layer = make_layer(stored=stored)
    x = make_x(5, 33)
    grades = _core.grade(x, layer.planes, layer.channel_order, **layer.grading(), widths=layer.widths)
    np.testing.assert_array_equal(grades, reference_grades(layer, x))


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (7, 33, 3), (577, 129, 16)])
def test_gemv_agrees_with_float64(isa: str, dtype: str, n: int, k: int, m: int) -> None:
    layer = make_layer(n, k, block=64, stored=0.9)
    x = make_x(m, k, dtype)
    bias = make_x(n, 1, dtype)[:, 0]
    y, read_bits = _core.gemv_read_bits(x, **layer.packed(), **layer.grading(), bias=bias, isa=isa)
    assert y.dtype == np.dtype(dtype)
    expected = reference_gemv(layer, x) + bias
    # Vector kernels hold activations in 16-bit fixed point.
    tolerance = 2e-3 if dtype == "float16" else 1e-5 if isa == "scalar" else 2e-4
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance * np.sqrt(k))
    bits = np.concatenate([[0], np.cumsum(layer.widths)])[reference_grades(layer, x)]
    np.testing.assert_allclose(read_bits, bits.mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_not_skipped(value: float) -> None:
    layer = make_layer()
    x = make_x(2, 33)
    x[0, 5] = value
    y = _core.gemv(x, **layer.packed(), **layer.grading())
    assert not np.isfinite(y[0]).any()
    assert np.isfinite(y[1]).all()


def test_gemv_without_extras_is_gemv_read_bits_without_the_bits() -> None:
    layer = make_layer()
    x = make_x(2, 33)
    expected, _ = _core.gemv_read_bits(x, **layer.packed(), **layer.grading())
    np.testing.assert_array_equal(_core.gemv(x, **layer.packed(), **layer.grading()), expected)


def test_a_budget_is_kept_and_nearly_used_up() -> None:
    layer = make_layer(64, 512)
    x = make_x(4, 512)
    for budget in (1.0, 3.0, 5.5):
        _, read_bits = _core.gemv_read_bits(x, **layer.packed(), **layer.grading(), budget=budget)
        assert (read_bits <= budget).all()
        assert (read_bits > budget - 0.1).all()


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    layer = make_layer(4099, 65)
    x = make_x(3, 65)
    results = []
    for count in (1, 2, 5):
        _core.set_num_threads(count)
        assert _core.num_threads() == count
        order = _core.sort_channels(make_weight(4099, 65))
        results.append(
            [order, *_core.quantize(make_weight(4099, 65), order), _core.gemv(x, **layer.packed(), **layer.grading())]
        )
    for other in results[1:]:
        for first, value in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first, value)


def test_calls_from_several_python_threads_do_not_disturb_each_other() -> None:
    layers = [make_layer(400 + i, 65) for i in range(4)]
    x = make_x(2, 65)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda layer: _core.gemv(x, **layer.packed(), **layer.grading()), layers * 4))
    for layer, y in zip(layers * 4, results, strict=True):
        np.testing.assert_array_equal(y, _core.gemv(x, **layer.packed(), **layer.grading()))


def test_arrays_of_other_libraries_and_read_only_ones_are_taken() -> None:
    torch = pytest.importorskip("torch")
    weight = make_weight(8, 6)
    expected = _core.sort_channels(weight)
    np.testing.assert_array_equal(_core.sort_channels(torch.from_numpy(weight.copy())), expected)
    weight.flags.writeable = False
    np.testing.assert_array_equal(_core.sort_channels(weight), expected)


def test_results_outlive_what_they_came_from() -> None:
    plane = make_layer().planes[0]
    expected = plane.copy()
    for _ in range(20):
        make_layer()
    np.testing.assert_array_equal(plane, expected)


LAYER = make_layer()
X = make_x(2, 33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.astype(np.float64)}, "x has dtype float64: allowed are float32 and float16"),
        ({"x": X[0]}, r"x has shape \[33\]: allowed is \[any, 33\]"),
        ({"x": X[:, :32].copy()}, r"x has shape \[2, 32\]: allowed is \[any, 33\]"),
        ({"x": np.asfortranarray(X)}, "x is strided: allowed are C-contiguous arrays"),
        ({"planes": LAYER.planes[:4]}, "widths has 5 entries: allowed is one for each of the 4 planes"),
        ({"planes": LAYER.planes[::-1]}, r"planes\[0\] has shape \[33, 18\]|planes\[1\] has shape"),
        (
            {"planes": [p[:, :-1].copy() for p in LAYER.planes]},
            r"planes\[0\] has shape \[33, 17\]: allowed is \[any, 18\]",
        ),
        ({"block_scale": LAYER.block_scale.astype(np.float32)}, "block_scale has dtype float32: allowed is float16"),
        ({"block_scale": LAYER.block_scale[:, :2].copy()}, r"block_scale has shape \[33, 2\]: allowed is \[33, 3\]"),
        ({"row_scale": LAYER.row_scale[:, None]}, r"row_scale has shape \[70, 1\]: allowed are 1 dimensions"),
        ({"gain": LAYER.gain[:4]}, r"gain has shape \[4\]: allowed is \[5\]"),
        ({"channel_order": LAYER.channel_order.astype(np.int64)}, "channel_order has dtype int64: allowed is int32"),
        ({"channel_order": np.zeros(33, np.int32)}, "channel_order.* 0, which occurred before"),
        ({"channel_order": np.arange(1, 34, dtype=np.int32)}, "channel_order.* 33: allowed are 0 to 32"),
        ({"channel_weight": np.full(33, -1, np.float32)}, r"channel_weight\[0\] is -1"),
        ({"channel_weight": np.full(33, np.nan, np.float32)}, r"channel_weight\[0\] is nan"),
        ({"thresholds": LAYER.thresholds[::-1].copy()}, r"thresholds\[1\]"),
        ({"thresholds": np.full(5, np.nan, np.float32)}, r"thresholds\[0\] is nan"),
        ({"thresholds": LAYER.thresholds[:3]}, r"thresholds has shape \[3\]: allowed is \[5\]"),
        ({"widths": [3, 1, 1, 2, 1]}, "widths has 3: allowed are 1, 2, 4 and 8"),
        ({"widths": [4, 2, 2, 2, 2]}, "widths add up to 12: allowed are at most 8"),
        ({"block": 48}, "block is 48: allowed are 32, 64 and 128"),
        ({"bias": np.zeros(70, np.float16)}, "bias has dtype float16: allowed is float32"),
        ({"bias": np.zeros(69, np.float32)}, r"bias has shape \[69\]: allowed is \[70\]"),
        ({"budget": -1.0}, "budget is -1"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"isa": "mmx"}, "isa is 'mmx': allowed on this machine are scalar"),
    ],
)
def test_gemv_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.gemv(**({"x": X} | LAYER.packed() | LAYER.grading() | change))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = make_weight(4, 5)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="weight has a NaN or infinite value"):
        _core.sort_channels(weight)
    with pytest.raises(ValueError, match="weight has a NaN or infinite value"):
        _core.quantize(weight, np.arange(5, dtype=np.int32))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="is 0: allowed are"):
        _core.sort_channels(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ([33, 33, 34, 0, 0], r"channels\[2\] is 34: allowed are 0 to 33"),
        ([33, 20, 21, 0, 0], r"channels\[2\] is 21"),
        ([33, -1, 0, 0, 0], r"channels\[1\] is -1"),
        ([33], "widths has 5 entries: allowed is one for each of the 1 planes"),
    ],
)
def test_pack_refuses(channels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.pack(LAYER.codes, FINE, channels)


def test_unpack_refuses_planes_with_more_channels_than_the_layer() -> None:
    with pytest.raises(ValueError, match=r"channels\[0\] is 33: allowed are 0 to 32"):
        _core.unpack(LAYER.planes, FINE, 70, 32)


@pytest.mark.parametrize("grade", [-1, 6])
def test_dequantize_refuses_a_grade_beyond_the_planes(grade: int) -> None:
    with pytest.raises(ValueError, match=f"grade is {grade}"):
        _core.dequantize(**LAYER.packed(), grade=grade)


def test_dequantize_refuses_another_dtype() -> None:
    with pytest.raises(ValueError, match="dtype is 'int8': allowed are 'float32' and 'float16'"):
        _core.dequantize(**LAYER.packed(), grade=1, dtype="int8")


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert _core.gemv(X[:0], **LAYER.packed(), **LAYER.grading()).shape == (0, 70)


def test_the_number_of_threads_is_at_least_one(threads: None) -> None:
    with pytest.raises(ValueError, match="count is 0: allowed are numbers of at least 1"):
        _core.set_num_threads(0)


def test_the_isa_in_use_is_an_available_one() -> None:
    assert _core.available_isas()[0] == "scalar"
    assert _core.current_isa() in _core.available_isas()


def test_every_function_says_what_it_does() -> None:
    functions = [value for name, value in vars(_core).items() if callable(value) and not name.startswith("_")]
    assert len(functions) == 12
    for function in functions:
        assert len((inspect.getdoc(function) or "").splitlines()) > 2, function
