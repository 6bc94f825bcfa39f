"""Write into a bundle what its variants compute for fixed observations, so that a robot compares even the first engine.

Without ``parity.fixed_chunks`` the first engine that is loaded has nothing to be compared with (see
:mod:`dcqfa_ros.runtime.parity`). The chunks are computed on ONNX Runtime, which every bundle's parity is recorded on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dcqfa_ros.bundle.errors import BundleError
from dcqfa_ros.bundle.load import listed_files, load_bundle, read_checked
from dcqfa_ros.bundle.schema import BundleSpec, VariantSpec
from dcqfa_ros.bundle.write import write_bundle
from dcqfa_ros.runtime.engines import ONNXRUNTIME, open_engine
from dcqfa_ros.runtime.parity import fixed_chunks
from dcqfa_ros.runtime.policy import PolicyRuntime

DECIMALS = 6  # of what is written, normalised units: far below what any two runtimes agree to


def with_fixed_chunks(
    spec: BundleSpec,
    files: Mapping[str, bytes],
    *,
    threads: int = 1,
    anew: bool = False,
    done: Callable[[str], None] = lambda _: None,
) -> BundleSpec:
    """Return ``spec`` with ``parity.fixed_chunks`` of every variant.

    Args:
        spec: the bundle's description.
        files: contents by path, as ``spec`` lists them.
        threads: of the engine.
        anew: also of variants that have them; else those are kept.
        done: told the name of each variant whose chunks were computed.

    Raises:
        PolicyError: a variant cannot be run, or its actions are far outside the bundle's limits.
    """
    variants = []
    for variant in spec.variants:
        if anew or variant.parity.fixed_chunks is None:
            parity = variant.parity.model_copy(update={"fixed_chunks": _chunks(spec, variant, files, threads)})
            variants.append(variant.model_copy(update={"parity": parity}))
            done(variant.name)
        else:
            variants.append(variant)
    return spec.model_copy(update={"variants": tuple(variants)})


def _chunks(spec: BundleSpec, variant: VariantSpec, files: Mapping[str, bytes], threads: int) -> tuple[float, ...]:
    graphs: dict[str, bytes] = {role: files[file.path] for role, file in variant.files.items()}
    runtime = PolicyRuntime(spec, open_engine(ONNXRUNTIME, graphs, threads=threads, name=variant.name))
    try:
        chunks = fixed_chunks(spec, lambda seen, seed, chunk: runtime.predict(seen, [seed], [chunk])[0])
    finally:
        runtime.close()
    return tuple(round(float(value), DECIMALS) for value in chunks.ravel())


def record_chunks(folder: Path, *, threads: int = 1, anew: bool = False) -> tuple[str, ...]:
    """Add ``parity.fixed_chunks`` to the bundle in ``folder``; no other field and no file of a variant changes.

    The bundle is replaced in one step (:func:`dcqfa_ros.bundle.write.write_bundle`): a reader finds it as it was or
    with every variant's chunks, sealed.

    Args:
        folder: of the bundle.
        threads: of the engine.
        anew: also where they are recorded.

    Returns:
        Names of the variants whose chunks were computed; where there are none, nothing is written.

    Raises:
        BundleError: the bundle is damaged, or cannot be written.
        PolicyError: as :func:`with_fixed_chunks`; nothing is written.
    """
    spec, files, issues = load_bundle(folder, verify=False).spec, {}, []
    for field, file in listed_files(spec):
        files[file.path], issue = read_checked(folder, file, field)
        issues += [] if issue is None else [issue]
    if issues:
        raise BundleError.from_issues(folder, issues)
    names: list[str] = []
    changed = with_fixed_chunks(spec, files, threads=threads, anew=anew, done=names.append)
    if names:
        write_bundle(folder, changed, files)
    return tuple(names)
