"""Which variants a running policy can be exchanged for: those of its bundle, and of others of the same contract."""

from __future__ import annotations

from typing import NamedTuple

from dcqfa_ros.bundle.contract import contract_differences
from dcqfa_ros.bundle.load import BUNDLE_YAML, Bundle, load_bundle
from dcqfa_ros.paths import find_bundle
from dcqfa_ros.runtime.engines import ONNXRUNTIME, runtime_facts
from dcqfa_ros.runtime.errors import PolicyError

OTHER_BUNDLES_KEPT = 4


class Target(NamedTuple):
    """What is asked for: ``label`` is the variant's name, or ``BUNDLE:VARIANT`` for another bundle's."""

    label: str
    runtime: str
    bundle: Bundle
    variant: str

    @property
    def engine(self) -> str:
        """``<runtime>/<label>``."""
        return f"{self.runtime}/{self.label}"

    @property
    def weights(self) -> str:
        """Identity of what is computed."""
        return self.bundle.spec.variant(self.variant).weights


class Targets:
    """Looks up what is asked for. Belongs to one thread.

    Attributes:
        bundle: the policy whose contract every other bundle must share.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Know the variants of ``bundle``."""
        self.bundle = bundle
        self._others: dict[str, tuple[tuple[int, int], Bundle]] = {}  # by folder: time and size of bundle.yaml

    def resolve(self, variant: str, runtime: str = ONNXRUNTIME) -> Target:
        """Return what ``variant`` means: a name of the bundle, or ``BUNDLE:VARIANT`` (a name or folder, and a variant).

        Cheap: no weights are read.

        Raises:
            PolicyError, BundleError: there is no such variant, runtime or bundle, or the bundle's contract is another
                one; the message names what differs.
        """
        facts = runtime_facts(runtime)
        place, other, name = variant.rpartition(":")
        bundle = self._open(place) if other else self.bundle
        try:
            bundle.spec.variant(name)
        except KeyError as error:
            raise PolicyError(str(error.args[0])) from None
        differences = [] if bundle is self.bundle else contract_differences(self.bundle.spec, bundle.spec)
        if differences:
            raise PolicyError(
                f"bundle {place!r} cannot take the place of {self.bundle.spec.name!r}: {'; '.join(differences)}"
            )
        return Target(name if bundle is self.bundle else variant, facts.name, bundle, name)

    def _open(self, place: str) -> Bundle:
        folder = find_bundle(place).resolve()
        if folder == self.bundle.folder.resolve():
            return self.bundle
        try:
            info = (folder / BUNDLE_YAML).stat()
        except OSError:
            return load_bundle(folder, verify=False)  # which says what is missing
        state = info.st_mtime_ns, info.st_size
        known = self._others.pop(str(folder), None)
        bundle = known[1] if known and known[0] == state else load_bundle(folder, verify=False)
        self._others[str(folder)] = state, bundle
        while len(self._others) > OTHER_BUNDLES_KEPT:
            del self._others[next(iter(self._others))]
        return bundle
