"""The policy of a checkpoint behind the robot's engine interface: a single network, or a subnet of a supernet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcqfa_ros.bundle.schema import BundleSpec
from dcqfa_ros.errors import UserError
from training.checkpoint import BASELINE, CHECKPOINT, load_checkpoint
from training.compiling import check_compiler, compiled
from training.nn.elastic import ElasticDecoderBlock
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT
from training.specification import PolicyMeaning
from training.subnet import SpaceError
from training.supernet_checkpoint import TrainedSupernet, is_supernet, load_supernet
from training.torch_engine import TorchEngine
from training.trained import TrainedPolicy, load_trained

PLAIN = "checkpoint"  # the name of a single network's one variant
DEFAULT_SUBNET = "largest"


class VariantError(UserError):
    """A variant that a checkpoint does not have; the message says which it has."""


@dataclass(frozen=True, slots=True)
class CheckpointVariant:
    """One network of a checkpoint.

    Attributes:
        source: the checkpoint.
        name: as it was asked for.
        subnet: the lossless name of a supernet's subnet, None for a single network.
    """

    source: TrainedPolicy | TrainedSupernet
    name: str
    subnet: str | None

    @property
    def specification(self) -> BundleSpec:
        """What the network sees and does."""
        return self.source.meaning.specification()

    def engine(self, threads: int, compile_blocks: bool = False) -> TorchEngine:
        """Run the network on ``threads`` threads of the whole process.

        Args:
            threads: number of threads.
            compile_blocks: compile a subnet's blocks, which needs a C++ compiler and half a minute, and then runs
                several times as fast: worth it from some hundred episodes on.

        Raises:
            CompilerError: there is no C++ compiler to compile with.
        """
        if isinstance(self.source, TrainedPolicy):
            return TorchEngine(self.source.network, threads)
        if compile_blocks:
            check_compiler()
        return TorchEngine(ready_subnet(self.source, self.name, compile_blocks), threads)


def ready_subnet(supernet: TrainedSupernet, name: str, compile_blocks: bool = False) -> ElasticDiffusionPolicyT:
    """The stand-alone network of a subnet, prepared for inference.

    Raises:
        SpaceError: the name is not one of the space.
    """
    _, network = supernet.subnet(name)
    network.freeze()
    if compile_blocks:
        network.decode_block = compiled(ElasticDecoderBlock.decode)
    return network


def find_variant(path: Path, name: str | None, option: str = "--variant") -> CheckpointVariant:
    """Read one network of a run folder or checkpoint file.

    Args:
        path: of the run or checkpoint.
        name: of a supernet's subnet (default: largest); a single network has none.
        option: names ``name`` in errors.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        VariantError: the supernet has no such subnet, a single network was asked for a variant, or the policy reads
            images.
    """
    payload = load_checkpoint(path / CHECKPOINT if path.is_dir() else path)
    if BASELINE in payload:
        return _quantized(path, name, option)
    if not is_supernet(payload):
        if name not in (None, PLAIN):
            raise VariantError(f"{option} {name}: {path} is a checkpoint and has no variants; export it first")
        trained = load_trained(path)
        refuse_images(trained.meaning, path)
        return CheckpointVariant(trained, PLAIN, None)
    supernet = load_supernet(path)
    refuse_images(supernet.meaning, path)
    name = name or DEFAULT_SUBNET
    try:
        return CheckpointVariant(supernet, name, supernet.space.name(supernet.space.parse(name)))
    except SpaceError as error:
        raise VariantError(f"{option} {name}: not in the search space of {path} ({error})") from error


def _quantized(path: Path, name: str | None, option: str) -> CheckpointVariant:
    """The one network of an artifact of ``dcqfa baseline``; see :func:`find_variant`."""
    from training.baselines.artifact import load_artifact

    trained, report = load_artifact(path)
    own = f"{report['method']}-{report['bits']}"
    if name not in (None, PLAIN, own):
        raise VariantError(f"{option} {name}: {path} holds one quantized policy, {own}")
    refuse_images(trained.meaning, path)
    return CheckpointVariant(trained, own, None)


def refuse_images(meaning: PolicyMeaning, path: Path) -> None:
    """Refuse a policy that reads images for closed-loop evaluation.

    Raises:
        VariantError: it does.
    """
    if meaning.config.policy.image is not None:
        raise VariantError(
            f"{path}: its policy reads images, which closed-loop evaluation does not render for it; compare held-out "
            f"losses ('dcqfa train' prints them, 'dcqfa subnet NAME --run {path} --eval --seeds 0' measures those of a "
            "supernet's subnets), or give a policy of key points"
        )


def open_checkpoint(
    path: Path, variant: str | None, threads: int, compiled: bool = False
) -> tuple[BundleSpec, str, TorchEngine]:
    """Open one network of a run folder or checkpoint file; see :func:`find_variant`.

    Returns:
        The policy's specification, the variant's name and the engine.

    Raises:
        UserError: as :func:`find_variant` and :meth:`CheckpointVariant.engine`.
    """
    found = find_variant(path, variant)
    return found.specification, found.name, found.engine(threads, compiled)
