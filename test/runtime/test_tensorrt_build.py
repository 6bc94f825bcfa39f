"""Every kind of graph is parsed and built by the real TensorRT-RTX, for named compute capabilities and without a GPU.

What is built here has been executed on no device.
"""

from __future__ import annotations

import platform
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from dcqfa_ros.runtime.capability import TENSORRT_RTX_CAPABILITIES
from dcqfa_ros.runtime.errors import EngineError
from dcqfa_ros.runtime.lowering import parse_model
from dcqfa_ros.runtime.lowering_tensorrt import TensorRtLowering, fix_sizes, lower_for_tensorrt, wants_half
from dcqfa_ros.runtime.tensorrt_build import (
    FLAVOURS,
    Flavour,
    build_engine,
    deserialize,
    load_flavour,
    require_capability,
)
from test.runtime.conftest import serialize as build_graph
from test.runtime.tensorrt_graphs import SIZES, linears, quantized
from training.export.diffusion_policy_t import export_graphs
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig

on_x86_linux = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"),
    reason="TensorRT-RTX builds are tested on x86_64 Linux only: its wheels exist for no other Linux",
)
MIXED = ("w4a4", "w8a8", "w4a8", "fp16", "w8a4", "w4a16", "w8a16")
Rtx = tuple[Flavour, ModuleType]


@pytest.fixture(scope="module")
def rtx() -> Rtx:
    try:
        return load_flavour("tensorrt_rtx")
    except EngineError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="module")
def graphs() -> dict[str, ModelProto]:
    torch.manual_seed(0)
    network = DiffusionPolicyT(DiffusionPolicyTConfig(depth=1, heads=2, dim=32, ffn_ratio=2)).eval()
    for parameter in network.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return {role: parse_model(data, role) for role, data in export_graphs(network, 50).items()}


def prepared(model: ModelProto, precision: str) -> tuple[bytes, TensorRtLowering]:
    kinds = {"mixed": MIXED, "weight_only": ("w4a4",)}.get(precision, (precision,))
    canonical = quantized(model, {weight: kinds[i % len(kinds)] for i, weight in enumerate(linears(model))})
    lowering = lower_for_tensorrt(
        canonical, "denoiser.onnx", half=wants_half(canonical), weight_only=precision == "weight_only"
    )
    fix_sizes(canonical, SIZES)
    return canonical.SerializeToString(), lowering


@on_x86_linux
@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a8", "w4a4", "mixed", "w4a16", "weight_only", "fp8"])
def test_the_denoiser_is_built_for_sm_86_and_89(rtx: Rtx, graphs: dict[str, ModelProto], precision: str) -> None:
    data, lowering = prepared(graphs["denoiser"], precision)
    for capability in ((8, 6), (8, 9)):
        if precision == "fp8" and capability == (8, 6):
            with pytest.raises(
                EngineError, match=r"FP8 needs compute capability 8\.9 or newer, this build is for 8\.6"
            ):
                build_engine(*rtx, data, "denoiser.onnx", capability, lowering.needs)
        else:
            assert len(build_engine(*rtx, data, "denoiser.onnx", capability, lowering.needs)) > len(data) // 8


@on_x86_linux
@pytest.mark.parametrize(
    ("role", "precision"),
    [("encoder", "fp32"), ("encoder", "mixed"), ("encoder", "weight_only"), ("encoder", "fp8"), ("timestep", "fp32")],
)
def test_the_other_graphs_are_built(rtx: Rtx, graphs: dict[str, ModelProto], role: str, precision: str) -> None:
    data, lowering = prepared(graphs[role], precision)
    assert build_engine(*rtx, data, f"{role}.onnx", (8, 9), lowering.needs)


@on_x86_linux
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)])
def test_w8a8_is_built_for_the_other_capabilities(
    rtx: Rtx, graphs: dict[str, ModelProto], capability: tuple[int, int]
) -> None:
    data, lowering = prepared(graphs["denoiser"], "w8a8")
    assert build_engine(*rtx, data, "denoiser.onnx", capability, lowering.needs)


@on_x86_linux
@pytest.mark.parametrize("capability", [(8, 7), (9, 0)])
def test_capabilities_that_rtx_does_not_build_for_are_refused_by_name(
    rtx: Rtx, graphs: dict[str, ModelProto], capability: tuple[int, int]
) -> None:
    data, lowering = prepared(graphs["denoiser"], "w8a8")
    with pytest.raises(EngineError, match=r"does not build for compute capability .*; it builds for 7\.5, 8\.0, 8\.6"):
        build_engine(*rtx, data, "denoiser.onnx", capability, lowering.needs)


@on_x86_linux
def test_what_the_parser_says_is_in_the_error(rtx: Rtx) -> None:
    shape = (TensorProto.FLOAT, [2, 2])
    data = build_graph([helper.make_node("Det", ["x"], ["y"], "the_node")], {"x": shape}, {"y": (1, [])}, {})
    with pytest.raises(EngineError, match=r"bad\.onnx: tensorrt_rtx 1\.7\.1\.116 cannot parse it: the_node: .+"):
        build_engine(*rtx, data, "bad.onnx", (8, 6), {"fp32"})


@on_x86_linux
def test_what_the_builder_says_is_in_the_error(rtx: Rtx, graphs: dict[str, ModelProto]) -> None:
    data, _ = prepared(graphs["denoiser"], "fp8")
    with pytest.raises(EngineError, match=r"cannot build it for compute capability 8\.6: .*fp8_e4m3"):
        build_engine(*rtx, data, "denoiser.onnx", (8, 6), {"fp16"})  # as if nobody had known of FP8


@on_x86_linux
def test_open_dimensions_are_refused(rtx: Rtx, graphs: dict[str, ModelProto]) -> None:
    with pytest.raises(EngineError, match=r"input 'noisy' has open dimensions \(-1, -1, 2\)"):
        build_engine(*rtx, graphs["denoiser"].SerializeToString(), "denoiser.onnx", (8, 6), {"fp32"})


@on_x86_linux
@pytest.mark.parametrize("cut", [0, 100])
def test_an_engine_that_cannot_be_loaded_is_refused_with_the_reason(
    rtx: Rtx, graphs: dict[str, ModelProto], cut: int
) -> None:
    """Whole engines cannot be loaded here either, for want of a driver; a machine with a GPU shows the other half."""
    data, lowering = prepared(graphs["timestep"], "fp32")
    plan = build_engine(*rtx, data, "timestep.onnx", (8, 6), lowering.needs)
    with pytest.raises(EngineError, match=r"timestep\.onnx: the engine cannot be loaded: .+"):
        deserialize(rtx[1], plan[: len(plan) - cut] if cut else plan[:64], "timestep.onnx")


@pytest.mark.parametrize(
    ("name", "capability", "refused"),
    [
        ("fp8", (8, 7), True),
        ("fp8", (8, 9), False),
        ("fp8", (9, 0), False),
        ("fp8", (12, 0), False),
        ("int8", (7, 0), True),
        ("int8", (7, 5), False),
        ("int4", (7, 5), True),
        ("int4", (8, 7), False),
        ("fp16", (7, 2), True),
    ],
)
def test_types_are_refused_below_the_capability_that_multiplies_them(
    name: str, capability: tuple[int, int], refused: bool
) -> None:
    if refused:
        with pytest.raises(EngineError, match=f"w.onnx: {name.upper()} needs compute capability"):
            require_capability(capability, {name}, "w.onnx")
    else:
        require_capability(capability, {name}, "w.onnx")


@on_x86_linux
def test_the_selector_offers_tensorrt_rtx_on_the_gpus_that_it_builds_for() -> None:
    members = load_flavour("tensorrt_rtx")[1].ComputeCapability.__members__
    found = {(int(name[2:-1]), int(name[-1])) for name in members if name.startswith("SM")}
    assert found == set(TENSORRT_RTX_CAPABILITIES)


@pytest.mark.parametrize(("flavour", "hint"), [("tensorrt", "JetPack 6.1"), ("tensorrt_rtx", "pip install --no-deps")])
def test_a_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch, flavour: str, hint: str) -> None:
    monkeypatch.setitem(sys.modules, FLAVOURS[flavour].module, None)
    with pytest.raises(EngineError, match=f"runtime {flavour} is not installed .*{hint}"):
        load_flavour(flavour)


def test_an_old_tensorrt_and_an_unknown_flavour_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for version in ("8.6.1", "10.2.0"):
        module.__version__ = version
        with pytest.raises(EngineError, match=f"expected tensorrt 10.3 or newer, found {version}"):
            load_flavour("tensorrt")
    for version in ("10.3.0", "10.16.1", "11.0.0"):
        module.__version__ = version
        assert load_flavour("tensorrt")[1] is module
    with pytest.raises(EngineError, match="expected one of tensorrt, tensorrt_rtx, got 'rtx'"):
        load_flavour("rtx")
