"""An engine is opened by the name of its runtime; what is unknown or not installed is refused with what to do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcqfa_ros.runtime.engine import Engine
from dcqfa_ros.runtime.engines import (
    RUNTIMES,
    distribution_version,
    installed_version,
    open_engine,
    runtime_facts,
    torch_without_cuda,
)
from dcqfa_ros.runtime.errors import EngineError
from test.runtime.conftest import tiny_files


class FakeEngine:
    """Takes what the engines of other runtimes take and remembers it."""

    def __init__(self, files: Any, **options: Any) -> None:
        self.files, self.options = files, options
        self.name = f"fake/{options['name']}"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every package seem installed, and every engine but ONNX Runtime's a fake."""
    for facts in RUNTIMES.values():
        if facts.name == "onnxruntime":
            continue
        monkeypatch.setitem(sys.modules, facts.package, types.ModuleType(facts.package))
        module = types.ModuleType(facts.module)
        setattr(module, facts.engine, FakeEngine)
        monkeypatch.setitem(sys.modules, facts.module, module)


def test_onnx_runtime_is_opened_and_named_after_runtime_and_variant() -> None:
    engine = open_engine("onnxruntime", tiny_files(quantized=True), name="w8a8")
    assert isinstance(engine, Engine)
    assert engine.name == "onnxruntime/w8a8"
    assert np.isfinite(engine.timestep_kv(np.array([0, 5]))).all()
    engine.close()


@pytest.mark.parametrize(
    ("runtime", "options"),
    [
        ("openvino", {"threads": 3, "name": "w8a8"}),
        ("tensorrt", {"name": "w8a8", "cache": Path("/cache"), "flavour": "tensorrt"}),
        ("tensorrt_rtx", {"name": "w8a8", "cache": Path("/cache"), "flavour": "tensorrt_rtx"}),
        ("torch_cuda", {"name": "w8a8", "device": "cuda"}),
    ],
)
def test_each_runtime_gets_the_options_of_its_engine(fakes: None, runtime: str, options: dict) -> None:
    files = {"encoder": b"e"}
    engine = open_engine(runtime, files, threads=3, name="w8a8", cache=Path("/cache"))
    assert isinstance(engine, FakeEngine)
    assert (engine.files, engine.options) == (files, options)


@pytest.mark.parametrize("runtime", ["tensorflow", "", "auto"])
def test_an_unknown_runtime_is_refused_with_those_there_are(runtime: str) -> None:
    with pytest.raises(EngineError, match=f"runtime {runtime!r} is unknown; there are onnxruntime, openvino") as error:
        open_engine(runtime, {}, name="fp32")
    assert all(name in str(error.value) for name in RUNTIMES)


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_a_missing_package_is_refused_with_what_to_install(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = RUNTIMES[runtime]
    monkeypatch.delitem(sys.modules, facts.package, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError) as error:
        open_engine(runtime, {}, name="fp32")
    assert f"runtime {runtime}: the Python package {facts.package} is not installed" in str(error.value)
    assert facts.install in str(error.value)


def test_a_package_that_cannot_be_imported_is_refused_with_its_own_words(
    fakes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise ImportError("libopenvino.so: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(EngineError, match=r"runtime openvino.*libopenvino\.so.*requirements/openvino\.txt"):
        open_engine("openvino", {}, name="fp32")


def test_naming_runtimes_imports_none_of_them() -> None:
    code = (
        "import json, sys\n"
        "from dcqfa_ros.runtime.engines import RUNTIMES, installed_version\n"
        "[installed_version(facts) for facts in RUNTIMES.values()]\n"
        "print(json.dumps([f.package for f in RUNTIMES.values() if f.package in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(answer.stdout.splitlines()[-1]) == []


def test_versions_come_from_the_first_distribution_that_is_installed() -> None:
    facts = runtime_facts("tensorrt")
    assert installed_version(facts, {"tensorrt-cu13": "10.16"}.get) == "10.16"
    assert installed_version(facts, {"tensorrt-cu13": "10.16", "tensorrt": "10.3"}.get) == "10.3"
    assert installed_version(facts, {}.get) is None
    assert distribution_version("numpy") == np.__version__
    assert distribution_version("a-package-nobody-has") is None


def test_what_was_never_executed_says_so() -> None:
    never = {name for name, facts in RUNTIMES.items() if "never executed by its authors" in facts.caveat}
    assert never == {"tensorrt", "tensorrt_rtx", "torch_cuda"}


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("from typing import Optional\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", True),
        ("cuda = None\n", True),
        ("cuda: Optional[str] = '12.6'\nhip: Optional[str] = None\n", False),
        ("__version__ = '2.13.0'\n", False),
        (None, False),
    ],
)
def test_a_torch_without_cuda_is_known_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, without: bool
) -> None:
    (tmp_path / "torch").mkdir()
    if text is not None:
        (tmp_path / "torch/version.py").write_text(text)
    found = types.SimpleNamespace(locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: found)
    assert torch_without_cuda() is without


def test_no_engine_of_the_processor_imports_the_other() -> None:
    code = "import sys, dcqfa_ros.runtime.openvino_engine\nprint('onnxruntime' in sys.modules, 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert answer.stdout.split() == ["False", "False"]
