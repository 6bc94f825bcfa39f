"""How many blocks of each group a subnet may keep, and which ones where they are spread evenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from training.policy_shape import PolicyShape
from training.space_config import SpaceConfig
from training.subnet import SpaceError

Groups = Mapping[str, tuple[int, ...]]
Choices = Mapping[str, tuple[int, ...]]


def evenly_kept(blocks: int, depth: int) -> tuple[int, ...]:
    """Indices of ``depth`` of ``blocks`` blocks, evenly spread, first and last kept (the first alone at depth 1).

    Raises:
        ValueError: not 0 <= depth <= blocks.
    """
    if not 0 <= depth <= blocks:
        raise ValueError(f"depth: expected 0 to {blocks}, got {depth}")
    if depth < 2:
        return tuple(range(depth))
    spaces = depth - 1
    # Whole numbers, rounded half up: the same pattern on every machine.
    return tuple((2 * i * (blocks - 1) + spaces) // (2 * spaces) for i in range(depth))


def offered(choices: Sequence[int]) -> str:
    """Ascending choices as text: ``2 to 8`` where every number between the ends is one, else all of them."""
    if len(choices) > 1 and choices[-1] - choices[0] == len(choices) - 1:
        return f"{choices[0]} to {choices[-1]}"
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def depth_choices(shape: PolicyShape, groups: Groups, config: SpaceConfig) -> dict[str, tuple[int, ...]]:
    """Ascending numbers of blocks that may be kept of every group; all of them of a group whose size is fixed.

    Raises:
        SpaceError: configuration and policy do not fit; the message names the field.
    """
    for field, named in (("min_depth", config.min_depth), ("depths", config.depths)):
        unknown = sorted(set(named) - set(groups))
        if unknown:
            raise SpaceError(
                f"space.{field}.{unknown[0]}: policy {shape.backbone} has no such group; it has {', '.join(groups)}"
            )
    result = {}
    for group, indices in groups.items():
        elastic = {shape.blocks[index].elastic for index in indices}
        if len(elastic) > 1:
            raise SpaceError(f"policy {shape.backbone}: group {group} mixes elastic blocks and blocks of fixed size")
        lowest = 1 if True in elastic else len(indices)
        if group in config.depths:
            result[group] = _listed(group, config.depths[group], lowest, len(indices))
            continue
        least = config.min_depth.get(group, None if True in elastic else len(indices))
        if least is None:
            raise SpaceError(
                f"space.min_depth.{group}: this field is missing; give 1 to {len(indices)}, or all numbers of blocks "
                f"to choose from as space.depths.{group}"
            )
        if not lowest <= least <= len(indices):
            raise SpaceError(f"space.min_depth.{group}: expected {lowest} to {len(indices)} blocks, got {least}")
        result[group] = tuple(range(least, len(indices) + 1))
    return result


def _listed(group: str, depths: Sequence[int], lowest: int, size: int) -> tuple[int, ...]:
    outside = [depth for depth in depths if not lowest <= depth <= size]
    if outside and lowest == size:
        raise SpaceError(
            f"space.depths.{group}: its {size} blocks are of fixed size and all kept, got {outside[0]}; leave it out"
        )
    if outside:
        raise SpaceError(f"space.depths.{group}: expected {lowest} to {size} blocks, got {outside[0]}")
    if depths[-1] != size:
        raise SpaceError(
            f"space.depths.{group}: the largest network is part of every space; add the whole group, {size}"
        )
    return tuple(depths)


def blocks_always_kept(
    groups: Groups, choices: Choices, configured: Mapping[str, Literal["first", "ends"]]
) -> frozenset[int]:
    """Indices of the blocks that are never skipped: ends of groups, which evenly spread patterns keep anyway.

    Blocks of fixed size are not among them: that their group is kept whole is said by its depth.

    Raises:
        SpaceError: an unknown group, or one that may keep fewer blocks than its ends are.
    """
    kept: set[int] = set()
    for group, which in configured.items():
        if group not in groups:
            raise SpaceError(f"space.always_kept.{group}: the policy has no such group; it has {', '.join(groups)}")
        ends = groups[group][:1] if which == "first" else {groups[group][0], groups[group][-1]}
        least = choices[group][0]
        if len(ends) > least:
            raise SpaceError(
                f"space.always_kept.{group}: {which} are {len(ends)} blocks, but a network may keep {least}; "
                f"give at least {len(ends)} (space.min_depth.{group} or space.depths.{group})"
            )
        kept.update(ends)
    return frozenset(kept)


def evenly_spread(groups: Groups, counts: Mapping[str, int]) -> tuple[int, ...]:
    """Ascending indices of the kept blocks where each group keeps ``counts`` of its own by :func:`evenly_kept`."""
    kept = (blocks[place] for group, blocks in groups.items() for place in evenly_kept(len(blocks), counts[group]))
    return tuple(sorted(kept))
