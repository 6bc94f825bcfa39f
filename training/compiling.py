"""Compilation of networks with ``torch.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from dcqfa_ros.errors import UserError

CACHED_GRAPHS = 256  # compiled forms of one function: one per arithmetic and kind of width of a block


class CompilerError(UserError):
    """Compilation was asked for where there is no compiler; the message says what to do."""


def check_compiler() -> None:
    """Return if PyTorch finds the C++ compiler that compilation for a CPU needs.

    Raises:
        CompilerError: it does not.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds to import, and only compilation needs it
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompilerError(
            "compilation (run.compile, --compile): PyTorch finds no C++ compiler on this computer; install one "
            "(Debian: g++), name it in the environment variable CXX, or do without compilation"
        ) from error


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for any sizes, in as many forms as a supernet's blocks come in."""
    # Said once per compiled form where weights are rounded to float16 under BF16 autocast, which is meant.
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed", category=UserWarning)
    limit = torch._dynamo.config.cache_size_limit
    torch._dynamo.config.cache_size_limit = max(limit, CACHED_GRAPHS)
    return torch.compile(function, dynamic=True)
