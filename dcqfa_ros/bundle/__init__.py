"""The contract between training and robot: what a policy sees, does and consists of, as one verified folder."""

from dcqfa_ros.bundle.errors import BundleError, BundleIssue, BundleNotFoundError
from dcqfa_ros.bundle.load import Bundle, load_bundle
from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.bundle.verify import VerifyReport, verify_bundle
from dcqfa_ros.bundle.write import file_spec, write_bundle

__all__ = [
    "Bundle",
    "BundleError",
    "BundleIssue",
    "BundleNotFoundError",
    "BundleSpec",
    "VerifyReport",
    "file_spec",
    "load_bundle",
    "verify_bundle",
    "write_bundle",
]
