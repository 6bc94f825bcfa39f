"""The one table of interfaces is what the running graph really has: publishers, subscribers, types, services."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from dcqfa_ros.paths import find_config
from dcqfa_ros.ros.arm_cell import CAMERAS
from dcqfa_ros.ros.arm_parameters import SOURCES
from dcqfa_ros.ros.interfaces import INTERFACES, OPTIONAL_PACKAGES, Interface
from dcqfa_ros.ros.testing import Graph, wait_until
from test.faults.cell import FaultCell

NODES = ("arm_node", "camera_node", "selector_node", "policy_node", "trial_node")


def test_every_row_of_the_table_is_what_the_graph_does(policy_bundle) -> None:
    bundle = policy_bundle()
    given = {"policy_node": {"bundle": bundle}, "selector_node": {"bundle": bundle}}
    with Graph() as graph:
        for name in NODES:
            graph.spawn_node(f"dcqfa_ros.nodes.{name}", name, **given.get(name, {}))
        graph.spawn_node(
            "dcqfa_ros.nodes.lifecycle_manager_node", "lifecycle_manager_node", node_names=f"[{','.join(NODES)}]"
        )
        graph.wait_graph("active")
        everyone = {*NODES, "lifecycle_manager_node"}
        services = {}
        for entry in (e for e in INTERFACES if e.cell != "arm"):
            if entry.kind == "service":
                services[f"/{entry.resolve()}"] = (entry.type, entry.publisher)
                continue
            topic = "/" + entry.resolve(**({"camera": "front"} if "{camera}" in entry.name else {}))
            publishers = everyone if entry.publisher == "all" else {entry.publisher}
            check(graph, entry, topic, publishers, set(entry.subscribers) & everyone)
        check_services(graph, everyone, services)


# a cell with an arm

ABSENT = {"operator", "policy_node", "selector_node", "trial_node", "joy_node"}  # no part of a cell without a policy
ARM_CELL = {
    "wrench_node",
    "wrist_camera_node",
    "front_camera_node",
    "arm_node",
    "teleop_node",
    "lifecycle_manager_node",
}


def test_every_row_of_a_cell_with_an_arm_is_what_its_graph_does() -> None:
    with FaultCell() as cell:
        graph = cell.graph
        cell.graph.spawn_node("dcqfa_ros.nodes.teleop_node", "teleop_node", input="joy")
        assert graph.activate("teleop_node")
        services = {}
        for entry in (e for e in INTERFACES if e.cell != "pusht" and not is_generic(e) and is_here(e)):
            if entry.kind == "service":
                if entry.publisher not in ABSENT:
                    services[f"/{entry.resolve()}"] = (entry.type, entry.publisher)
                continue
            for topic, publishers, readers in sides(entry):
                check(graph, entry, topic, publishers, readers)
        check_services(graph, ARM_CELL, services)


def test_every_row_of_another_arm_behind_ros_2_controllers_is_what_its_node_does() -> None:
    box = {"workspace.minimum": "[-1.0, -1.0, 0.0]", "workspace.maximum": "[1.0, 1.0, 1.0]"}
    chain = {"ros.kinematics": str(find_config("inovo_arm")), "driver": "ros"}
    with Graph() as graph:
        graph.spawn_node("dcqfa_ros.nodes.cell_arm_node", "arm_node", **box, **chain)
        graph.spawn_node(
            "dcqfa_ros.nodes.cell_arm_node", "other_arm", **box, **chain, **{"ros.output": "joint_velocity"}
        )
        for name in ("arm_node", "other_arm"):
            assert graph.configure(name)
        both = {"arm_node", "other_arm"}
        for entry in filter(is_generic, INTERFACES):
            topic = f"/{entry.resolve()}"
            if entry.key == "input_joint_states":
                wait_until(lambda topic=topic: names(graph, topic, "subscriptions") == both, topic)
                continue
            wanted = {"output_twist": {"arm_node"}, "output_joint_velocity": {"other_arm"}}.get(entry.key, both)
            wait_until(lambda topic=topic, wanted=wanted: names(graph, topic, "publishers") == wanted, topic)
            assert {i.topic_type for i in graph.node.get_publishers_info_by_topic(topic)} == {entry.type}, topic


def is_generic(entry: Interface) -> bool:
    return entry.key.startswith(("output_", "input_"))


def is_here(entry: Interface) -> bool:
    package = entry.type.split("/")[0]
    return package not in OPTIONAL_PACKAGES or importlib.util.find_spec(package) is not None


def sides(entry: Interface) -> Iterator[tuple[str, set[str], set[str]]]:
    """Yield each topic of a row, who publishes it and who reads it."""
    readers = set(entry.subscribers) & ARM_CELL
    if "{camera}" in entry.name:
        for camera in CAMERAS:
            watched = {"arm_node"} if entry.key == "camera_info" else set()
            yield f"/{entry.resolve(camera=camera)}", {f"{camera}_camera_node"}, readers | watched
    elif "{source}" in entry.name:
        for source in SOURCES:
            if (source, entry.key) != ("policy", "gripper_command"):  # there the policy sends chunks
                publishers = {entry.publisher} - ABSENT if source == "teleop" else set()
                yield f"/{entry.resolve(source=source)}", publishers, readers
    else:
        everyone = ARM_CELL if entry.publisher == "all" else {entry.publisher}
        if entry.publisher == "camera_node":
            everyone = {f"{camera}_camera_node" for camera in CAMERAS}
        yield f"/{entry.resolve()}", everyone - ABSENT, readers


def check(graph: Graph, entry: Interface, topic: str, publishers: set[str], readers: set[str]) -> None:
    for side, wanted in (("publishers", publishers), ("subscriptions", readers)):  # discovery takes its time
        wait_until(
            lambda side=side, wanted=wanted: names(graph, topic, side) >= wanted,
            f"{topic}: {side} {', '.join(sorted(wanted))}",
        )
        assert names(graph, topic, side) == wanted, topic
    here = {
        i.topic_type
        for side in ("publishers", "subscriptions")
        for i in getattr(graph.node, f"get_{side}_info_by_topic")(topic)
    }
    assert here == ({entry.type} if publishers | readers else set()), topic


def check_services(graph: Graph, everyone: set[str], services: dict[str, tuple[str, str]]) -> None:
    found: dict[str, list[str]] = {}

    def discovered() -> bool:
        found.update(pair for node in everyone for pair in by_node(graph, node))
        return set(found) >= set(services)

    wait_until(discovered, "every service of the table")
    assert {name: found[name] for name in services} == {name: [type_] for name, (type_, _) in services.items()}
    own = {n for n, types in found.items() if types == ["std_srvs/srv/Trigger"]}
    assert own == set(services), "a service that the table does not know"


def names(graph: Graph, topic: str, side: str) -> set[str]:
    """Nodes on one side of a topic, without the test's own."""
    infos = getattr(graph.node, f"get_{side}_info_by_topic")(topic)
    return {info.node_name for info in infos} - {graph.node.get_name()}


def by_node(graph: Graph, node: str) -> list[tuple[str, list[str]]]:
    """Services that a node offers."""
    return list(graph.node.get_service_names_and_types_by_node(node, "/"))
