"""Build of the ament_python package; everything else about the project is in package.xml and pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

NAME = "dcqfa_ros"
# `colcon build --symlink-install` runs a link to this file in its build folder: the sources are where the link leads.
ROOT = Path(__file__).resolve().parent
PACKAGES = [NAME, f"{NAME}.*"]
NODES = (
    *("arm_node", "camera_node", "cell_arm_node", "lifecycle_manager_node", "policy_node", "selector_node"),
    *("teleop_node", "trial_node", "wrench_node"),
)

# pip installs `training` too; colcon runs `install` or `develop` and puts the robot's part into the workspace only.
WITH_TRAINING = {"install", "develop"}.isdisjoint(sys.argv)


def requirements(name: str) -> list[str]:
    """Return requirements/NAME.txt with its pins as lower bounds; the files it includes are extras of their own."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return [line.replace("==", ">=", 1) for line in lines if line and not line.startswith("-")]


def data_files() -> list[tuple[str, list[str]]]:
    """Return what goes to share/: the ament marker, package.xml, and the trees of launch, config and models."""
    files = [
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
    ]
    for tree in ("launch", "config", "models"):
        for folder, _, names in sorted(os.walk(ROOT / tree)):
            relative = Path(folder).relative_to(ROOT)
            shared = [str(relative / name) for name in sorted(names) if not name.startswith(".")]
            hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
            if shared and not hidden:
                files.append((f"share/{NAME}/{relative}", shared))
    return files


def entry_points() -> dict[str, list[str]]:
    """Return console scripts and, where ``training`` is installed, what it adds to the command line."""
    points = {
        "console_scripts": [f"dcqfa = {NAME}.cli:main", *(f"{node} = {NAME}.nodes.{node}:main" for node in NODES)]
    }
    if WITH_TRAINING:
        points["dcqfa.commands"] = [
            *(f"{name} = training.commands:{name}" for name in ("train", "eval")),
            *(
                f"{name} = training.commands_{name}:{name}"
                for name in (
                    "baseline",
                    "compare",
                    "deviation",
                    "export",
                    "mixed",
                    "pack",
                    "profile",
                    "sampler",
                    "search",
                    "subnet",
                )
            ),
        ]
        points["dcqfa.bench_commands"] = [f"{name} = training.commands_bench:{name}" for name in ("train", "rollouts")]
        points["dcqfa.bench_engines"] = ["torch_eager = training.bench:torch_eager"]
    return points


setup(
    name=NAME,
    version="0.1.0",
    description="Learned manipulation policies from demonstrations to the robot, quantized for its computer",
    license="Apache-2.0",
    maintainer="dcqfa_ros maintainers",
    maintainer_email="dcqfa-ros@users.noreply.github.com",
    python_requires=">=3.10,<3.13",
    packages=find_packages(str(ROOT), include=[*PACKAGES, "training", "training.*"] if WITH_TRAINING else PACKAGES),
    data_files=data_files(),
    install_requires=["setuptools", *requirements("robot")],
    extras_require={name: requirements(name) for name in ("cell", "sim", "train", "test")},
    entry_points=entry_points(),
    zip_safe=False,
)
