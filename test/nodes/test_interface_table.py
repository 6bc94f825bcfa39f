"""The one table of interfaces is what the running graph really has: publishers, subscribers, types, services."""

from __future__ import annotations

from dcqfa_ros.ros.interfaces import INTERFACES
from dcqfa_ros.ros.testing import Graph, wait_until

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
            readers = set(entry.subscribers) & everyone
            for side, wanted in (("publishers", publishers), ("subscriptions", readers)):  # discovery takes its time
                wait_until(
                    lambda topic=topic, side=side, wanted=wanted: names(graph, topic, side) >= wanted,
                    f"{topic}: {side} {', '.join(sorted(wanted))}",
                )
                assert names(graph, topic, side) == wanted, topic
            assert {i.topic_type for i in graph.node.get_publishers_info_by_topic(topic)} == {entry.type}, topic
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
