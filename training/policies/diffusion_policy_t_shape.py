"""DiffusionPolicy-T as the search space, the tables and the counts see it."""

from __future__ import annotations

from typing import Literal

from training.nn.vision import encoder_flops, encoder_parameters
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policy_shape import BlockShape, LinearShape, PolicyShape, Slice
from training.quant.calibrate import InputGroup

BACKBONE = "diffusion_policy_t"
KIND = GROUP = "decoder"


def diffusion_policy_t_shape(config: DiffusionPolicyTConfig, tokens: int | None = None) -> PolicyShape:
    """Elastic blocks of the network that ``config`` describes, and the sum of the rest.

    Keys and values of the time token are tabulated per noise level, so per chunk only those of the observations are
    computed; cross-attention sees both. An image encoder is a fixed part that runs once per chunk on every image of the
    history.

    Args:
        config: architecture.
        tokens: action tokens that are computed at every denoising step; the prediction horizon if None. Attention is
            causal, so a robot computes only those up to the last action that it executes.

    Raises:
        ValueError: not 1 <= tokens <= horizon.
    """
    run = config.horizon if tokens is None else tokens
    if not 1 <= run <= config.horizon:
        raise ValueError(f"tokens: expected 1 to the horizon {config.horizon}, got {run}")
    d, ffn, observations = config.dim, config.ffn_ratio * config.dim, config.observation_horizon
    linears = _linears(d, ffn, run, observations)
    blocks = tuple(
        BlockShape(
            name=f"blocks.{index}",
            kind=KIND,
            group=GROUP,
            dim=d,
            heads=config.heads,
            head_dim=d // config.heads,
            mlp=ffn,
            tokens=run,
            memory_tokens=1 + observations,
            linears=linears,
            float_parameters=3 * 2 * d,  # three layer norms
        )
        for index in range(config.depth)
    )
    embeddings = (config.noisy_dim + 1) * d + (config.condition_dim + 1) * d
    positions = (config.horizon + 1 + observations) * d
    memory_mlp = d * 4 * d + 4 * d + 4 * d * d + d
    final = 2 * d + (d + 1) * config.action_dim
    vision = (0, 0) if config.image is None else (encoder_parameters(config.image), encoder_flops(config.image))
    return PolicyShape(
        backbone=BACKBONE,
        blocks=blocks,
        fixed_parameters=embeddings + positions + memory_mlp + final + vision[0],
        fixed_flops_chunk=observations * (2 * (config.condition_dim * d + 2 * d * 4 * d) + vision[1]),
        fixed_flops_step=2 * run * (config.noisy_dim + config.action_dim) * d,  # action embedding and final layer
    )


def _linears(d: int, ffn: int, tokens: int, observations: int) -> tuple[LinearShape, ...]:
    """Linear layers of one block."""

    def linear(
        name: str, sizes: tuple[int, int], slices: tuple[Slice, Slice], stage: Literal["chunk", "step"] = "step"
    ) -> LinearShape:
        rows = observations if stage == "chunk" else tokens
        return LinearShape(name, *sizes, *slices, bias=True, stage=stage, tokens=rows)

    into: tuple[Slice, Slice] = ("full", "heads")
    out: tuple[Slice, Slice] = ("heads", "full")
    return (
        *(linear(f"self_attn.{part}", (d, d), into) for part in "qkv"),
        linear("self_attn.o", (d, d), out),
        linear("cross_attn.q", (d, d), into),
        *(linear(f"cross_attn.{part}", (d, d), into, "chunk") for part in "kv"),
        linear("cross_attn.o", (d, d), out),
        linear("fc1", (d, ffn), ("full", "mlp")),
        linear("fc2", (ffn, d), ("mlp", "full")),
    )


def input_groups(network: DiffusionPolicyT) -> tuple[InputGroup, ...]:
    """Quantized linears of the policy by shared input (``algorithms.md`` section 1).

    Embeddings, memory MLP and action head are not among them and stay in floating point.
    """
    groups = []
    for index in range(len(network.blocks)):
        block = f"blocks.{index}"
        groups.append(InputGroup(f"{block}.self_attn.qkv", tuple(f"{block}.self_attn.{p}" for p in "qkv")))
        for single in ("self_attn.o", "cross_attn.q", "cross_attn.o", "fc1", "fc2"):
            groups.append(InputGroup(f"{block}.{single}", (f"{block}.{single}",)))
    memory = tuple(f"blocks.{i}.cross_attn.{p}" for i in range(len(network.blocks)) for p in "kv")
    return (*groups, InputGroup("memory", memory))
