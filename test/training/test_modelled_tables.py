"""Tables modelled from published peaks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from training.commands_profile import MODELLED
from training.cost import cost
from training.lut import load_table
from training.modelled_tables import DEVICES, ORIN_NX_16GB, ModelledDevice, modelled_table
from training.policies.diffusion_policy_t import DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.space import SearchSpace
from training.space_config import SpaceConfig
from training.subnet import Layer, Precision

SHIPPED = Path(__file__).parents[2] / "config" / "tables" / "orin_nx_16gb.json"
CONFIG = SpaceConfig(min_depth={"decoder": 2}, head_ratios=(0.25, 0.5, 0.75, 1.0), mlp_ratios=(0.25, 0.5, 0.75, 1.0))


def space(tokens: int = 9, dim: int = 256) -> SearchSpace:
    return SearchSpace(diffusion_policy_t_shape(DiffusionPolicyTConfig(dim=dim), tokens), CONFIG)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_modelled_table_covers_its_space_and_says_that_it_is_modelled(device: ModelledDevice) -> None:
    table = modelled_table(device, space())
    table.check(space())
    assert table.modelled
    assert table.name == device.name
    assert "NVIDIA" in table.device.fingerprint
    assert "data sheet" in table.device.fingerprint or "white paper" in table.device.fingerprint
    assert "assumed" in table.method.notes[0]


def test_the_help_names_every_device() -> None:
    assert tuple(device.name for device in DEVICES) == MODELLED
    assert set(MODELLED) == {"orin_nx_16gb", "orin_nx_8gb", "orin_nano_8gb", "agx_orin_64gb", "rtx_4090", "h200"}


@pytest.mark.parametrize(
    ("name", "gpu_sparse_tops"),
    [
        ("orin_nx_16gb", 60),
        ("orin_nx_8gb", 50),
        ("orin_nano_8gb", 40),
        ("agx_orin_64gb", 170),
        ("rtx_4090", 1321),
        ("h200", 3958),
    ],
)
def test_int8_peaks_are_half_of_what_data_sheets_print_with_sparsity(name: str, gpu_sparse_tops: float) -> None:
    device = next(device for device in DEVICES if device.name == name)
    assert 2e-12 * device.forms[Precision.INT, 8].operations == pytest.approx(gpu_sparse_tops, rel=0.03)


def test_faster_devices_take_less_time() -> None:
    costs = {
        device.name: cost(
            modelled_table(device, space()), space().shape, space().largest(Precision.FP32), 16
        ).latency_ms
        for device in DEVICES
    }
    assert costs["orin_nano_8gb"] > costs["orin_nx_8gb"] >= costs["orin_nx_16gb"] > costs["agx_orin_64gb"]
    assert costs["agx_orin_64gb"] > costs["rtx_4090"] > costs["h200"]


@pytest.mark.parametrize("tokens", [9, 16])
def test_the_shipped_table_is_what_the_model_gives(tokens: int) -> None:
    shipped, table = load_table(SHIPPED), modelled_table(ORIN_NX_16GB, space(tokens))
    assert set(table.blocks) <= set(shipped.blocks)
    assert set(table.fixed) <= set(shipped.fixed)
    assert shipped.forms == table.forms


def test_wider_blocks_take_longer_and_more_bits_do_too() -> None:
    table, block = modelled_table(ORIN_NX_16GB, space()), space().shape.blocks[0]
    for executed in {form.executed for form in table.forms}:
        widths = [table.block(block, Layer(4, mlp, 8, 8), executed).step_ms for mlp in (256, 512, 768, 1024)]
        assert widths == sorted(widths)
        heads = [table.block(block, Layer(count, 1024, 8, 8), executed) for count in (1, 2, 3, 4)]
        assert [entry.step_ms for entry in heads] == sorted(entry.step_ms for entry in heads)
        assert [entry.kv_ms for entry in heads] == sorted(entry.kv_ms for entry in heads)
    largest = [space().largest(precision) for precision in (Precision.INT, Precision.FP16, Precision.FP32)]
    times = [cost(table, space().shape, subnet, 16).latency_ms for subnet in largest]
    assert times == sorted(times)


def test_four_bit_weights_save_the_time_of_reading_them_where_that_binds() -> None:
    wide = space(dim=4096)  # 200 million weights a block: read from memory at 77 GB/s
    table = modelled_table(ORIN_NX_16GB, wide)
    low, high = (cost(table, wide.shape, wide.largest(Precision.INT, w, 8), 16).latency_ms for w in (4, 8))
    assert 1.8 < high / low < 2.05


def test_a_block_time_is_at_least_its_bytes_over_the_bandwidth() -> None:
    table, block = modelled_table(ORIN_NX_16GB, space()), space().shape.blocks[0]
    weights = sum(layer.in_features * layer.out_features for layer in block.linears if layer.stage == "step")
    entry = table.block(block, Layer(4, 1024, 8, 8), "int8")
    assert entry.step_ms > 1e3 * weights / ORIN_NX_16GB.bandwidth
    faster = dataclasses.replace(ORIN_NX_16GB, launch_seconds=0.0)
    assert modelled_table(faster, space()).block(block, Layer(4, 1024, 8, 8), "int8").step_ms < entry.step_ms
