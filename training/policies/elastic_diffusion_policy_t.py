"""DiffusionPolicy-T as a supernet: every subnet of its search space in one set of parameters.

Parameter names are those of :class:`DiffusionPolicyT`; quantizer steps come on top. Outside the blocks (embeddings,
memory MLP, final layer) nothing is elastic and nothing is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from training.compiling import compiled
from training.nn.elastic import ElasticDecoderBlock
from training.nn.elastic_policy import ElasticPolicy
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policy_shape import PolicyShape


class ElasticDiffusionPolicyT(ElasticPolicy, DiffusionPolicyT):
    """A DiffusionPolicy-T whose active subnet can be exchanged between two calls at no cost."""

    def __init__(self, config: DiffusionPolicyTConfig, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Make the network with random weights, uncalibrated steps and the full-precision whole network active.

        Args:
            config: architecture.
            sizes: heads and hidden channels per block; those of ``config`` in every block if None.
        """
        full = (config.heads, config.ffn_ratio * config.dim)
        self.sizes = tuple(sizes) if sizes is not None else (full,) * config.depth
        super().__init__(config)
        self.run_enter: Callable[..., tuple[Tensor, Tensor]] = ElasticDiffusionPolicyT._enter
        self.run_block: Callable[..., Tensor] = ElasticDecoderBlock.forward
        self.run_leave: Callable[..., Tensor] = ElasticDiffusionPolicyT._leave
        self.decode_block: Callable[..., Tensor] = ElasticDecoderBlock.decode
        self.begin()

    def _make_blocks(self) -> Iterable[nn.Module]:
        config = self.config
        head_dim = config.dim // config.heads
        return (
            ElasticDecoderBlock(config.dim, heads, head_dim, mlp, config.attention_dropout) for heads, mlp in self.sizes
        )

    @property
    def shape(self) -> PolicyShape:
        """What the search space, the tables and the counts know of this network."""
        return diffusion_policy_t_shape(self.config)

    def blueprint(self, kept: Sequence[tuple[int, tuple[int, int]]]) -> Callable[[], ElasticDiffusionPolicyT]:
        """What makes an untrained network of some of the blocks: see :meth:`ElasticPolicy.blueprint`."""
        config = self.config.model_copy(update={"depth": len(kept)})
        return partial(ElasticDiffusionPolicyT, config, [size for _, size in kept])

    def elastic_blocks(self) -> tuple[ElasticDecoderBlock, ...]:
        """The blocks in order, typed."""
        return cast(tuple[ElasticDecoderBlock, ...], tuple(self.blocks))

    # Parts that run at different rates -------------------------------------------------------------------------------

    def keys_values(self, memory: Tensor) -> Tensor:
        """Cross-attention keys and values (B, R, S, D) of memory tokens (B, S, dim).

        The R rows are, for every kept block in order, the keys of its kept heads and then the values.
        """
        blocks = self.elastic_blocks()
        parts = [part for i, width, bits in self._plan for part in blocks[i].keys_values(memory, width, bits)]
        return torch.cat(parts, dim=1)

    def denoise(self, noisy: Tensor, timestep_kv: Tensor, observation_kv: Tensor) -> Tensor:
        """Predict the noise (B, T, Da) in the first T tokens of a chunk (B, T, Da).

        Args:
            noisy: (B, T, action_dim), T at most the horizon.
            timestep_kv: (1 or B, R, 1, D).
            observation_kv: (B, R, To, D).
        """
        tokens = noisy.shape[1]
        x = self.action_embedding(noisy) + self.action_position[:, :tokens]
        kv = torch.cat([timestep_kv.expand(noisy.shape[0], *timestep_kv.shape[1:]), observation_kv], dim=-2)
        parts = torch.split(kv, [width.heads for _, width, _ in self._plan for _ in range(2)], dim=1)
        masks = self.self_mask[:tokens, :tokens], self.cross_mask[:tokens]
        blocks = self.elastic_blocks()
        for place, (i, width, bits) in enumerate(self._plan):
            x = self.decode_block(blocks[i], x, parts[2 * place], parts[2 * place + 1], *masks, width, bits)
        return self.head(self.norm(x))

    def forward(self, noisy: Tensor, timesteps: Tensor, observation: Tensor) -> Tensor:
        """Predict the noise (B, T, Da) in ``noisy`` at ``timesteps`` (B,) given observations (B, To, Do)."""
        return self.trunk(*self.stem(noisy, timesteps, observation))

    def stem(self, noisy: Tensor, timesteps: Tensor, observation: Tensor) -> tuple[Tensor, Tensor]:
        """What no subnet changes: action tokens (B, T, dim) and memory tokens (B, 1 + To, dim); see :meth:`forward`."""
        return self.run_enter(self, noisy, timesteps, self.conditions(observation))

    def trunk(self, x: Tensor, memory: Tensor) -> Tensor:
        """Predict the noise (B, T, Da) from the tokens of :meth:`stem`, with the active subnet."""
        tokens = x.shape[1]
        masks = self.self_mask[:tokens, :tokens], self.cross_mask[:tokens]
        blocks = self.elastic_blocks()
        for i, width, bits in self._plan:
            x = self.run_block(blocks[i], x, memory, *masks, width, bits)
        return self.run_leave(self, x)

    def _enter(self, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Action tokens (B, T, dim) and memory tokens (B, 1 + To, dim)."""
        memory = torch.cat([self.time_tokens(timesteps), self.condition_tokens(conditions)], dim=1)
        return self.action_embedding(noisy) + self.action_position[:, : noisy.shape[1]], memory

    def _leave(self, x: Tensor) -> Tensor:
        """Noise (B, T, Da) of the last block's tokens (B, T, dim)."""
        predicted: Tensor = self.head(self.norm(x))
        return predicted

    def compile_parts(self) -> None:
        """Compile what :meth:`forward` runs: one form of a block serves all widths and bits of an arithmetic.

        An image encoder is left as it is: its convolutions are library calls either way.
        """
        self.run_enter = compiled(ElasticDiffusionPolicyT._enter)
        self.run_block = compiled(ElasticDecoderBlock.forward)
        self.run_leave = compiled(ElasticDiffusionPolicyT._leave)
