"""DiffusionPolicy-T: the transformer denoiser of Diffusion Policy (``algorithms.md`` section 8).

Memory tokens are ``[t, o_-1, o_0]``, each passed through a Mish MLP; action token i sees memory token j <= i + 1.
With key points and horizon 16 the network has 8,965,122 parameters, with images and horizon 10 it has 20,172,450.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dcqfa_ros.bundle.strict import StrictModel
from training.nn.blocks import DecoderBlock
from training.nn.vision import CHANNELS, ImageConfig, ImageEncoder


class DiffusionPolicyTConfig(StrictModel):
    """Architecture of DiffusionPolicy-T; the defaults are the published key-point network.

    Attributes:
        observation_dim: low-dimensional scalars of one time step; an image comes on top.
        prefix: largest number of leading action tokens that it takes as already known; with any, a channel that flags
            them comes on top of the actions (delay conditioning; Black et al. 2025, training-time action conditioning).
        image: the images that it reads besides; None for none.
    """

    observation_dim: int = Field(default=20, ge=1)
    action_dim: int = Field(default=2, ge=1)
    horizon: int = Field(default=16, ge=2)
    observation_horizon: int = Field(default=2, ge=1)
    depth: int = Field(default=8, ge=1)
    heads: int = Field(default=4, ge=1)
    dim: int = Field(default=256, ge=8)
    ffn_ratio: int = Field(default=4, ge=1)
    attention_dropout: float = Field(default=0.01, ge=0.0, lt=1.0)
    prefix: int = Field(default=0, ge=0)
    image: ImageConfig | None = None

    @model_validator(mode="after")
    def _divisible(self) -> DiffusionPolicyTConfig:
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be an even multiple of heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _something_to_predict(self) -> DiffusionPolicyTConfig:
        if self.prefix >= self.horizon:
            raise ValueError(f"prefix {self.prefix} leaves nothing to predict of horizon {self.horizon}; expected less")
        return self

    @property
    def noisy_dim(self) -> int:
        """Channels of one noisy action token as the network reads it: the action, and the flag where there is one."""
        return self.action_dim + (1 if self.prefix else 0)

    @property
    def input_dim(self) -> int:
        """Scalars of one time step as the network reads it: the low-dimensional ones, then those of the image."""
        return self.observation_dim + (0 if self.image is None else self.image.scalars)

    @property
    def condition_dim(self) -> int:
        """Scalars of one time step as they are embedded: an image is its features by then."""
        return self.observation_dim + (0 if self.image is None else self.image.features)


def additive_mask(allowed: Tensor) -> Tensor:
    """Turn a boolean mask into an additive one: 0 where allowed, a large negative number elsewhere."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e4)


class DiffusionPolicyT(nn.Module):
    """Noise predictor eps(x_t, t, o) split into the three parts that the robot runs at different rates.

    ``observation_keys_values`` runs once per chunk, ``timestep_keys_values`` once per noise level (tabulated),
    ``denoise`` at every step. ``forward`` composes them for training.
    """

    self_mask: Tensor
    cross_mask: Tensor
    frequencies: Tensor

    def __init__(self, config: DiffusionPolicyTConfig) -> None:
        """Make the network with random weights from PyTorch's global generator."""
        super().__init__()
        self.config = config
        d = config.dim
        self.action_embedding = nn.Linear(config.noisy_dim, d)
        self.action_position = nn.Parameter(torch.zeros(1, config.horizon, d))
        self.observation_embedding = nn.Linear(config.condition_dim, d)
        self.memory_position = nn.Parameter(torch.zeros(1, 1 + config.observation_horizon, d))
        self.memory_fc1 = nn.Linear(d, 4 * d)
        self.memory_fc2 = nn.Linear(4 * d, d)
        self.blocks = nn.ModuleList(self._make_blocks())
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.action_dim)
        tokens, memory = config.horizon, 1 + config.observation_horizon
        i, j = torch.arange(tokens)[:, None], torch.arange(memory)[None, :]
        self.register_buffer(
            "self_mask", additive_mask(torch.tril(torch.ones(tokens, tokens, dtype=torch.bool))), False
        )
        self.register_buffer("cross_mask", additive_mask(j <= i + 1), False)
        half = d // 2
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1))), False)
        self.apply(self._init)
        nn.init.normal_(self.action_position, std=0.02)
        nn.init.normal_(self.memory_position, std=0.02)
        self.image_encoder = None if config.image is None else ImageEncoder(config.image)

    def _make_blocks(self) -> Iterable[nn.Module]:
        config = self.config
        width = config.ffn_ratio * config.dim
        return (DecoderBlock(config.dim, config.heads, width, config.attention_dropout) for _ in range(config.depth))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def decoder_blocks(self) -> list[DecoderBlock]:
        """The blocks in order, typed."""
        return [block for block in self.blocks if isinstance(block, DecoderBlock)]

    def _memory_mlp(self, tokens: Tensor) -> Tensor:
        return self.memory_fc2(nn.functional.mish(self.memory_fc1(tokens)))

    def time_tokens(self, timesteps: Tensor) -> Tensor:
        """Memory tokens (S, 1, dim) of integer ``timesteps`` (S,)."""
        angles = timesteps.to(torch.float32)[:, None] * self.frequencies[None, :]
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None, :]
        return self._memory_mlp(embedding + self.memory_position[:, :1])

    def observation_tokens(self, observation: Tensor) -> Tensor:
        """Memory tokens (B, To, dim) of normalised observations (B, To, input_dim); see :meth:`conditions`."""
        return self.condition_tokens(self.conditions(observation))

    def condition_tokens(self, conditions: Tensor) -> Tensor:
        """Memory tokens (B, To, dim) of conditions (B, To, condition_dim); see :meth:`conditions`."""
        return self._memory_mlp(self.observation_embedding(conditions) + self.memory_position[:, 1:])

    def conditions(self, observation: Tensor) -> Tensor:
        """Replace the image of every time step by its features: (B, To, input_dim) to (B, To, condition_dim).

        One time step holds the low-dimensional scalars and then the cropped image, channels before rows before columns.
        """
        if self.image_encoder is None or self.config.image is None:
            return observation
        low = self.config.observation_dim
        side = self.config.image.crop
        images = observation[..., low:].unflatten(-1, (CHANNELS, side, side))
        features = self.image_encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return torch.cat([observation[..., :low], features.to(observation.dtype)], dim=-1)

    def keys_values(self, memory: Tensor) -> Tensor:
        """Cross-attention keys and values (B, R, S, D) of memory tokens (B, S, dim).

        The R rows are, for every block in order, the keys of its heads and then the values.
        """
        parts = [part for block in self.decoder_blocks() for part in block.cross_attn.keys_values(memory)]
        return torch.cat(parts, dim=1)

    def timestep_keys_values(self, timesteps: Tensor) -> Tensor:
        """Keys and values (S, R, 1, D) of the time token for every noise level in ``timesteps`` (S,)."""
        return self.keys_values(self.time_tokens(timesteps))

    def observation_keys_values(self, observation: Tensor) -> Tensor:
        """Keys and values (B, R, To, D) of the observations (B, To, input_dim)."""
        return self.keys_values(self.observation_tokens(observation))

    def denoise(self, noisy: Tensor, timestep_kv: Tensor, observation_kv: Tensor) -> Tensor:
        """Predict the noise in the first T tokens of a chunk.

        Args:
            noisy: (B, T, noisy_dim), T at most the horizon. Attention is causal, so fewer tokens cost less and change
                nothing in those computed.
            timestep_kv: (1 or B, R, 1, D).
            observation_kv: (B, R, To, D).

        Returns:
            Predicted noise (B, T, action_dim).
        """
        tokens = noisy.shape[1]
        x = self.action_embedding(noisy) + self.action_position[:, :tokens]
        shape = (noisy.shape[0], *timestep_kv.shape[1:])
        kv = torch.cat([timestep_kv.expand(shape), observation_kv], dim=-2)
        self_mask, cross_mask = self.self_mask[:tokens, :tokens], self.cross_mask[:tokens]
        blocks = self.decoder_blocks()
        parts = torch.split(kv, [block.cross_attn.heads for block in blocks for _ in range(2)], dim=1)
        for index, block in enumerate(blocks):
            x = block(x, parts[2 * index], parts[2 * index + 1], self_mask, cross_mask)
        return self.head(self.norm(x))

    def forward(self, noisy: Tensor, timesteps: Tensor, observation: Tensor) -> Tensor:
        """Predict the noise (B, T, Da) in ``noisy`` (B, T, noisy_dim) at ``timesteps`` (B,) given observations.

        Observations are (B, To, input_dim).
        """
        memory = torch.cat([self.time_tokens(timesteps), self.observation_tokens(observation)], dim=1)
        tokens = noisy.shape[1]
        x = self.action_embedding(noisy) + self.action_position[:, :tokens]
        self_mask, cross_mask = self.self_mask[:tokens, :tokens], self.cross_mask[:tokens]
        for block in self.decoder_blocks():
            keys, values = block.cross_attn.keys_values(memory)
            x = block(x, keys, values, self_mask, cross_mask)
        return self.head(self.norm(x))


def parameter_count(module: nn.Module) -> int:
    """Number of parameters (buffers are not counted)."""
    return sum(p.numel() for p in module.parameters())
