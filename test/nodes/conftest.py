"""The tiny policy of the runtime's tests, for graphs that run one."""

from test.runtime.conftest import policy_bundle

__all__ = ["policy_bundle"]
