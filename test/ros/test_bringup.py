"""The node set, the options, and the launch file made of them."""

from __future__ import annotations

import importlib.util
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dcqfa_ros.bundle.errors import BundleError
from dcqfa_ros.bundle.load import load_bundle
from dcqfa_ros.bundle.schema import ActionSpace
from dcqfa_ros.commands.up import parse_options
from dcqfa_ros.drivers.extrinsics import CalibrationError
from dcqfa_ros.errors import ConfigNotFoundError
from dcqfa_ros.ros import bringup
from dcqfa_ros.ros.bringup import (
    MANAGER,
    OPTIONS,
    BringupError,
    BringupOptions,
    TrialOptions,
    describe,
    options_from_text,
)
from dcqfa_ros.ros.parameter_files import ParameterFileError
from dcqfa_ros.ros.supervisor import _command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> str:
    return str(tiny_bundle())


def test_the_simulated_cell_has_its_nodes_in_order_and_the_manager_knows_them(bundle: str) -> None:
    nodes = describe(BringupOptions(bundle=bundle))
    names = ["arm_node", "camera_node", "selector_node", "policy_node", "trial_node"]
    assert [n.name for n in nodes] == [*names, MANAGER]
    manager = nodes[-1]
    assert manager.stops_first
    assert manager.parameters["node_names"] == names
    assert manager.parameters["optional_names"] == ["camera_node", "selector_node", "trial_node"]


def test_given_trials_are_run_at_once_and_needed(bundle: str, tmp_path: Path) -> None:
    trials = TrialOptions(("realtime:1", "lockstep:2"), tmp_path)
    nodes = {n.name: n for n in describe(BringupOptions(bundle=bundle, trials=trials))}
    assert nodes["trial_node"].parameters["trials"] == ["realtime:1", "lockstep:2"]
    assert nodes["trial_node"].parameters["autostart"] and nodes["trial_node"].parameters["exit_when_done"]
    assert nodes[MANAGER].parameters["node_names"][-1] == "trial_node"
    assert "trial_node" not in nodes[MANAGER].parameters["optional_names"]


def test_every_described_module_exists(bundle: str, tmp_path: Path) -> None:
    for node in describe(BringupOptions(bundle=bundle, trials=TrialOptions(("lockstep:1",), tmp_path))):
        assert importlib.util.find_spec(node.module) is not None
        assert node.name == node.module.rpartition(".")[2]


def test_options_reach_the_nodes(bundle: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("/**: {ros__parameters: {lost_after_s: 5.0}}\n")
    options = parse_options([f"bundle:={bundle}", "variant:=w8a8", "rate:=max", "autostart:=false",
                             f"parameters_file:={own}", "namespace:=cell/a"], restart=True)  # fmt: skip
    assert options.restart
    nodes = {n.name: n for n in describe(options)}
    assert nodes["policy_node"].parameters == {"bundle": bundle, "variant": "w8a8", "rate": "max"}
    assert nodes["arm_node"].parameters["rate"] == "max"
    assert nodes[MANAGER].parameters["autostart"] is False
    assert nodes["arm_node"].parameter_files[-1] == own


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["cell"], "expected name:=value, got 'cell'"),
        (["cell:=pusht", "cell:=pusht"], "cell:= is given twice"),
        (["bundel:=x"], "bundel:= is no option; there are bundle, variant"),
        (["autostart:=yes"], "autostart:= expects true or false, got 'yes'"),
    ],
)
def test_options_that_cannot_be_read_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(BringupError, match=message):
        parse_options(texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cell": "real"},
            "its actions are planar_position in frame table, which the arm of cell:=real does not execute",
        ),
        ({"cell": "kitchen"}, "cell:= expects pusht or emulated or real, got 'kitchen'"),
        ({"rate": "fast"}, "rate:= expects realtime or max"),
        ({"variant": "int2"}, "bundle tiny has no such variant; there are fp32, w8a8, and auto"),
        ({"cell": "real", "bundle": "", "rate": "max"}, "rate:=max is for pusht; cell:=real runs in real time"),
        ({"cell": "emulated", "bundle": "", "variant": "fp32"}, "variant:=fp32 needs bundle:="),
        ({"teleop": "true"}, "teleop:=true needs an arm: cell:=emulated or real"),
        ({"watchdog": "false"}, "watchdog:=false needs an arm: cell:=emulated or real"),
        ({"remap": "chunk"}, "remap:= expects FROM=TO with names of topics"),
        ({"remap": "a=b c"}, "remap:= expects FROM=TO"),
        ({"namespace": "a b"}, "namespace:= expects letters"),
        ({"namespace": "1a"}, "namespace:= expects letters"),
    ],
)
def test_options_that_cannot_be_brought_up_are_refused(bundle: str, change: dict[str, str], message: str) -> None:
    with pytest.raises(BringupError, match=message):
        describe(options_from_text({"bundle": bundle, **change}))


def test_several_parameter_files_and_other_names_of_topics(bundle: str, tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text("{}")
    names = "remap:=output/twist=/servo_node/delta_twist_cmds,input/joint_states=joint_states"
    options = parse_options(["cell:=real", f"parameters_file:={files[0]},{files[1]}", names])
    nodes = {n.name: n for n in describe(options)}
    assert nodes["arm_node"].parameter_files[-2:] == tuple(files)
    command = _command(nodes["arm_node"], "/", tmp_path, "python3")
    assert "output/twist:=/servo_node/delta_twist_cmds" in command
    assert "input/joint_states:=joint_states" in command


def test_an_unknown_bundle_and_parameter_file_are_refused(bundle: str) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        describe(BringupOptions(bundle="nowhere"))
    with pytest.raises(ConfigNotFoundError, match=r"parameters_file:=nowhere\.yaml: no such"):
        describe(BringupOptions(bundle=bundle, parameters_file="nowhere.yaml"))


def test_recording_needs_ros2_bag_and_covers_the_namespace(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    options = BringupOptions(bundle=bundle, record=True, namespace="a")
    with pytest.raises(BringupError, match="record:=true needs ros2 bag"):
        describe(options)
    program = tmp_path / "ros2"
    program.touch()
    program.chmod(stat.S_IRWXU)
    recorder = next(n for n in describe(options) if n.name == "recorder")
    assert recorder.command[:3] == (str(program), "bag", "record")
    assert "/a/command/policy/chunk" in recorder.command


def test_the_command_line_of_a_node_keeps_types_and_names(bundle: str, tmp_path: Path) -> None:
    node = describe(BringupOptions(bundle=bundle, variant="fp32"))[3]
    command = _command(node, "/a", tmp_path, "python3")
    assert command[:3] == ["python3", "-m", "dcqfa_ros.nodes.policy_node"]
    assert "__ns:=/a" in command
    assert "__node:=policy_node" in command
    own = yaml.safe_load(Path(command[-1]).read_text())
    assert own["/**"]["ros__parameters"] == dict(node.parameters)


def test_parameters_in_the_cell_file_belong_to_described_nodes(bundle: str, tmp_path: Path) -> None:
    names = {n.name for n in describe(BringupOptions(bundle=bundle, trials=TrialOptions(("lockstep:1",), tmp_path)))}
    document = yaml.safe_load((ROOT / "config" / "pusht_cell.yaml").read_text())
    assert {key.removeprefix("/**/") for key in document} <= names


# cells with an arm


def test_the_emulated_cell_has_its_devices_watchdog_and_nodes_in_order() -> None:
    nodes = describe(BringupOptions(cell="emulated", teleop=True))
    names = ["wrench_node", "wrist_camera_node", "front_camera_node", "arm_node", "teleop_node"]
    assert [n.name for n in nodes] == ["emulator", "watchdog", *names, MANAGER]
    manager = nodes[-1]
    assert manager.parameters["node_names"] == names
    assert manager.parameters["optional_names"] == ["wrist_camera_node", "front_camera_node", "teleop_node"]
    for node in nodes[2:]:
        assert importlib.util.find_spec(node.module) is not None


def test_addresses_of_emulators_and_watchdog_reach_the_nodes() -> None:
    nodes = {n.name: n for n in describe(BringupOptions(cell="emulated"))}
    emulator, watchdog = nodes["emulator"].command_line("py"), nodes["watchdog"].command_line("py")
    port = emulator[emulator.index("--port") + 1]
    arm = nodes["arm_node"].parameters
    assert (emulator[0], watchdog[0]) == ("py", "py")
    assert (arm["inovo.host"], str(arm["inovo.port"])) == ("127.0.0.1", port)
    assert watchdog[watchdog.index("--url") + 1] == f"ws://127.0.0.1:{port}"
    assert watchdog[watchdog.index("--listen") + 1] == arm["watchdog.address"]
    assert emulator[emulator.index("--ft300s-link") + 1] == nodes["wrench_node"].parameters["port"]


def test_two_emulated_cells_share_nothing() -> None:
    one, two = ({n.name: n for n in describe(BringupOptions(cell="emulated", namespace=name))} for name in ("a", "b"))
    for name in ("emulator", "watchdog"):
        assert not {w for w in one[name].command if "_" in w and "/" in w} & set(two[name].command)
    assert one["arm_node"].parameters["inovo.port"] != two["arm_node"].parameters["inovo.port"]


def test_the_real_cell_takes_addresses_from_its_files(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "/**/arm_node: {ros__parameters: {inovo: {host: 10.0.0.5}, inovo.port: 9099,"
        " watchdog.address: 'unix:/run/dcqfa/watchdog.sock'}}\n"
    )
    nodes = {n.name: n for n in describe(BringupOptions(cell="real", parameters_file=str(own)))}
    assert "emulator" not in nodes
    command = nodes["watchdog"].command
    assert command[-4:] == ("--url", "ws://10.0.0.5:9099", "--listen", "unix:/run/dcqfa/watchdog.sock")
    assert nodes["wrench_node"].parameters == {}
    assert "inovo.host" not in nodes["arm_node"].parameters


def test_addresses_come_from_the_sections_of_the_cells_own_namespace(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "/a/arm_node: {ros__parameters: {inovo.host: 10.0.0.5}}\n/b/arm_node: {ros__parameters: {driver: ros}}\n"
    )
    with pytest.raises(ParameterFileError, match="/b/arm_node: no node of this cell"):
        describe(BringupOptions(cell="real", parameters_file=str(own), namespace="a"))
    own.write_text("/a/arm_node: {ros__parameters: {inovo.host: 10.0.0.5}}\n")
    nodes = {n.name: n for n in describe(BringupOptions(cell="real", parameters_file=str(own), namespace="/a"))}
    assert "ws://10.0.0.5:9090" in nodes["watchdog"].command


def test_the_watchdog_is_left_to_a_service_or_to_another_arms_means(tmp_path: Path) -> None:
    assert "watchdog" not in {n.name for n in describe(BringupOptions(cell="real", watchdog=False))}
    own = tmp_path / "own.yaml"
    own.write_text("/**/arm_node: {ros__parameters: {driver: ros}}\n")
    nodes = describe(BringupOptions(cell="real", parameters_file=str(own)))
    assert "watchdog" not in {n.name for n in nodes}


def test_bad_files_of_a_cell_with_an_arm_are_refused(tmp_path: Path) -> None:
    own, poses = tmp_path / "own.yaml", tmp_path / "poses.yaml"
    options = BringupOptions(cell="real", parameters_file=str(own))
    own.write_text("- a list\n")
    with pytest.raises(ParameterFileError, match="expected sections such as"):
        describe(options)
    own.write_text("/**/arm_nod: {ros__parameters: {workspace.minimum: [0.0, 0.0, 0.0]}}\n")
    with pytest.raises(ParameterFileError, match=r"own.yaml: /\*\*/arm_nod: .*did you mean /\*\*/arm_node"):
        describe(options)
    own.write_text("/**/arm_node: {ros__parameters: {inovo.port: many}}\n")
    with pytest.raises(BringupError, match=r"needs the parameters inovo.host and inovo.port"):
        describe(options)
    own.write_text(f"/**/wrist_camera_node: {{ros__parameters: {{extrinsics.calibration_file: {poses}}}}}\n")
    poses.write_text("schema_version: 1\ncameras: {wrist: {parent: table}}\n")
    with pytest.raises(CalibrationError, match=r"cameras.wrist.position"):
        describe(options)


def test_a_policy_joins_a_cell_with_an_arm_when_its_actions_are_for_one(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_bundle())
    with pytest.raises(BringupError, match="its actions are planar_position"):
        describe(BringupOptions(cell="emulated", bundle=folder))
    spec = load_bundle(Path(folder), verify=False).spec
    action = spec.action.model_copy(update={"space": ActionSpace.TCP_TWIST_GRIPPER})
    loaded = SimpleNamespace(spec=spec.model_copy(update={"action": action}))
    monkeypatch.setattr(bringup, "load_bundle", lambda *_, **__: loaded)
    nodes = describe(BringupOptions(cell="emulated", bundle=folder))
    assert [n.name for n in nodes[-4:]] == ["selector_node", "policy_node", "trial_node", MANAGER]


@pytest.mark.parametrize("cell", ["inovo_cell", "emulated_cell"])
def test_parameters_in_the_files_of_an_arm_belong_to_described_nodes_and_are_known(cell: str) -> None:
    described = {n.name for n in describe(BringupOptions(cell="emulated", teleop=True))}
    document = yaml.safe_load((ROOT / "config" / f"{cell}.yaml").read_text())
    sections = {key.removeprefix("/**/") for key in document}
    assert sections <= set(bringup.ARM_CELL_NODES)
    assert sections - described <= {"selector_node", "policy_node", "trial_node"}, "those of a bundle"


def _has_launch() -> bool:
    try:
        from launch import LaunchDescription  # noqa: F401 - `import launch` alone finds this repository's folder
        from launch_ros.actions import Node  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not _has_launch(), reason="launch and launch_ros are not installed: launch file not exercised")
def test_the_launch_file_starts_what_bringup_describes(bundle: str) -> None:
    from launch import LaunchContext
    from launch.actions import DeclareLaunchArgument, OpaqueFunction

    spec = importlib.util.spec_from_file_location("policy_launch", ROOT / "launch" / "policy.launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entities = module.generate_launch_description().entities
    names = {e.name for e in entities if isinstance(e, DeclareLaunchArgument)}
    assert names == {o.name for o in OPTIONS} | {"python"}
    context = LaunchContext()
    for entity in entities:
        if isinstance(entity, DeclareLaunchArgument):
            entity.execute(context)
    context.launch_configurations.update(bundle=bundle, namespace="a", python=sys.executable)
    (function,) = (e for e in entities if isinstance(e, OpaqueFunction))
    actions = function.execute(context)
    commands = [["".join(s.perform(context) for s in part) for part in action.cmd[:3]] for action in actions]
    expected = [n.module for n in describe(BringupOptions(bundle=bundle, namespace="a"))]
    assert commands == [[sys.executable, "-m", module] for module in expected]
