from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

import training
from training.quant.batchquant import BatchQuant, RangeNotEstimatedError, reestimated_ranges
from training.quant.quantizer import code_range

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(2, 8), st.integers(1, 12)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)
bits = st.sampled_from([4, 8])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def corrected(gain: float, shift: float) -> BatchQuant:
    """A quantizer whose corrections are away from their start."""
    quantizer = BatchQuant()
    with torch.no_grad():
        quantizer.raw_gain += gain
        quantizer.shift += shift
    return quantizer


def estimated(quantizer: BatchQuant, *batches: Tensor) -> BatchQuant:
    quantizer.eval()
    with reestimated_ranges(quantizer), torch.no_grad():
        for x in batches:
            quantizer(x, 8)
    return quantizer


@settings(deadline=None)
@given(array=values, bits=bits, gain=st.floats(-0.5, 0.5), shift=st.floats(-1, 1))
def test_codes_are_whole_numbers_in_range(array: np.ndarray, bits: int, gain: float, shift: float) -> None:
    codes, _, step = corrected(gain, shift).quantize(torch.from_numpy(array), bits)
    low, high = code_range(bits)
    assert torch.equal(codes, codes.round())
    assert low <= codes.min()
    assert codes.max() <= high
    assert step > 0


@settings(deadline=None)
@given(array=values, bits=bits)
def test_it_starts_as_plain_asymmetric_quantization_of_the_mean_channel_range(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    low, high = code_range(bits)
    minimum = x.amin(dim=0).mean().clamp_max(0.0)
    maximum = x.amax(dim=0).mean().clamp_min(0.0)
    scale = ((maximum - minimum) / (high - low)).clamp_min(1e-8)
    zero_point = int((low - torch.round(minimum / scale)).clamp(low, high))
    u = x / scale
    tie = ((u - torch.floor(u)) - 0.5).abs() < 1e-3  # where dividing and multiplying by the inverse may differ
    result = BatchQuant()(x, bits)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, torch.tensor(zero_point, dtype=torch.int32), low, high)
    torch.testing.assert_close(result[~tie], expected[~tie], rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(array=values, bits=bits, gain=st.floats(-0.5, 0.5), shift=st.floats(-1, 1))
def test_with_a_fixed_range_quantizing_twice_changes_nothing(
    array: np.ndarray, bits: int, gain: float, shift: float
) -> None:
    x = torch.from_numpy(array)
    quantizer = estimated(corrected(gain, shift), x)
    once = quantizer(x, bits)
    assert torch.equal(quantizer.quantize(once, bits).codes, quantizer.quantize(x, bits).codes)


def test_values_are_codes_less_the_offset_times_the_step() -> None:
    x = random(16, 8)
    quantizer = corrected(0.2, 0.3)
    codes, offset, step = quantizer.quantize(x, 4)
    assert torch.equal(quantizer(x, 4), (codes - offset) * step)
    low = x.to(torch.bfloat16)
    assert quantizer(low, 4).dtype == quantizer.quantize(low, 4).codes.dtype == torch.bfloat16


@pytest.mark.parametrize("width", [4, 8])
def test_gradients_are_the_finite_differences_of_all_but_the_rounding(width: int) -> None:
    x = random(64, 16)
    quantizer = corrected(0.1, 0.2)
    weights = random(64, 16, seed=1)
    x.requires_grad_()
    (weights * quantizer(x, width)).sum().backward()
    x = x.detach()
    index = quantizer.bits.index(width)
    low, high = code_range(width)
    minimum, maximum = (end.double() for end in quantizer.batch_range(x))
    base = (maximum - minimum) / (high - low)
    zero_point = (low - torch.round(minimum / base)).clamp(low, high)
    codes = quantizer.quantize(x, width).codes.double()
    raw, shift = quantizer.raw_gain.detach()[index].double(), quantizer.shift.detach()[index].double()

    def scaled(x: Tensor, raw: Tensor, shift: Tensor) -> Tensor:
        return (x * nn.functional.softplus(raw) / base + zero_point + shift).clamp(low, high)

    rounding = codes - scaled(x.double(), raw, shift)

    def smooth(x: Tensor, raw: Tensor, shift: Tensor) -> Tensor:
        """The range of the batch and the rounding are held fixed."""
        restored = (scaled(x, raw, shift) + rounding - zero_point - shift) * base / nn.functional.softplus(raw)
        return weights * restored

    at, small = (x.double(), raw, shift), 1e-6
    numeric = []
    for i in range(3):
        above, below = ([v + sign * small if j == i else v for j, v in enumerate(at)] for sign in (1, -1))
        numeric.append((smooth(*above) - smooth(*below)) / (2 * small))
    leaf = BatchQuant()
    leaf.load_state_dict(quantizer.state_dict())
    inside = (scaled(*at) > low + 1e-3) & (scaled(*at) < high - 1e-3)
    beyond = (scaled(*at) == low) | (scaled(*at) == high)
    assert inside.any() and beyond.any() and (inside | beyond).all()
    x_leaf = x.clone().requires_grad_()
    (weights * leaf(x_leaf, width)).sum().backward()
    torch.testing.assert_close(x_leaf.grad.double(), numeric[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaf.raw_gain.grad[index].double(), numeric[1].sum(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(leaf.shift.grad[index].double(), numeric[2].sum(), rtol=1e-3, atol=1e-3)
    assert leaf.shift.grad[1 - index] == leaf.raw_gain.grad[1 - index] == 0  # one pair per bit width


def test_a_narrower_input_needs_no_other_quantizer() -> None:
    quantizer = BatchQuant()
    x = random(32, 12)
    wide, narrow = quantizer.quantize(x, 8).step, quantizer.quantize(x[:, :3], 8).step
    assert narrow == BatchQuant().quantize(x[:, :3].clone(), 8).step != wide


def test_evaluation_uses_the_mean_range_of_the_batches_run_for_this_subnet() -> None:
    first, second, other = (random(32, 4, seed=seed) * (1 + seed) for seed in range(3))
    quantizer = estimated(BatchQuant(), first, second)
    ranges = [quantizer.batch_range(x) for x in (first, second)]
    torch.testing.assert_close(quantizer.minimum, (ranges[0][0] + ranges[1][0]) / 2)
    torch.testing.assert_close(quantizer.maximum, (ranges[0][1] + ranges[1][1]) / 2)
    assert quantizer.quantize(other, 4).step == quantizer.quantize(first, 4).step
    estimated(quantizer, other)
    torch.testing.assert_close(quantizer.maximum, quantizer.batch_range(other)[1])


def test_estimation_ends_after_an_error_and_leaves_parameters_alone() -> None:
    quantizer = corrected(0.1, 0.1)
    before = [p.clone() for p in quantizer.parameters()]
    with pytest.raises(IndexError), reestimated_ranges(nn.Sequential(quantizer)):
        quantizer(torch.tensor(0.0), 8)  # a tensor without channels
    assert not quantizer.estimating
    assert all(map(torch.equal, quantizer.parameters(), before))


def test_evaluation_without_a_range_and_other_bits_are_refused() -> None:
    with pytest.raises(RangeNotEstimatedError, match="inside reestimated_ranges"):
        BatchQuant().eval()(random(4, 4), 8)
    with pytest.raises(ValueError, match="4 or 8, got 2"):
        BatchQuant((2, 8))
    with pytest.raises(ValueError, match=r"made for \(8,\), got 4"):
        BatchQuant((8,))(random(4, 4), 4)


def test_an_estimated_range_is_part_of_the_saved_state() -> None:
    quantizer = estimated(corrected(0.1, 0.2), random(16, 4))
    restored = BatchQuant().eval()
    restored.load_state_dict(quantizer.state_dict())
    x = random(8, 4, seed=3)
    assert torch.equal(restored(x, 4), quantizer(x, 4))


def test_processes_share_the_range_of_their_common_batch(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, torch
        from training.quant.batchquant import BatchQuant
        rank = int(sys.argv[1])
        torch.distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        print(*map(float, BatchQuant().batch_range(x[4 * rank : 4 * rank + 4])))
        torch.distributed.destroy_process_group()
    """)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(tmp_path / "meeting")],
            cwd=Path(training.__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    low, high = map(float, BatchQuant().batch_range(random(8, 4)))
    assert outputs == [f"{low} {high}\n"] * 2
