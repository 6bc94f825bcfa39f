from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch._inductor.config as inductor

from training.compiling import CompilerError, check_compiler
from training.config import load_config
from training.trainer import Trainer


@pytest.fixture
def no_compiler() -> Iterator[None]:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


def test_a_missing_compiler_is_told_with_what_to_do(no_compiler: None) -> None:
    with pytest.raises(CompilerError, match=r"no C\+\+ compiler .* CXX"):
        check_compiler()


def test_a_run_that_compiles_on_a_cpu_without_a_compiler_is_refused_before_anything_is_read(
    no_compiler: None, write_config: Callable[..., Path], tmp_path: Path, npz: Path
) -> None:
    config = load_config(write_config(compile=True))
    npz.unlink()
    with pytest.raises(CompilerError, match=r"run\.compile"):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
