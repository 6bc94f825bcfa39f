"""DiffusionPolicy-T as a supernet: every subnet of its search space in one set of parameters.

Parameter names are those of :class:`DiffusionPolicyT`; quantizer steps come on top. Outside the blocks (embeddings,
memory MLP, final layer) nothing is elastic and nothing is quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from training.compiling import compiled
from training.nn.elastic import (
    Arithmetic,
    Bits,
    ElasticDecoderBlock,
    ElasticLinear,
    InputQuantizer,
    Width,
    integer_bits,
)
from training.policies.diffusion_policy_t import DiffusionPolicyT, DiffusionPolicyTConfig
from training.policies.diffusion_policy_t_shape import diffusion_policy_t_shape
from training.policy_shape import PolicyShape
from training.quant.batchquant import BatchQuant
from training.quant.quantizer import BITS
from training.subnet import Layer, Precision, Subnet

ARITHMETIC = {
    Precision.FP32: Arithmetic.FLOAT,
    Precision.FP16: Arithmetic.HALF,
    Precision.FP8: Arithmetic.FP8,
    Precision.INT: Arithmetic.INTEGER,
}


class ElasticDiffusionPolicyT(DiffusionPolicyT):
    """A DiffusionPolicy-T whose active subnet can be exchanged between two calls at no cost.

    Attributes:
        sizes: heads and hidden channels of every block at full width.
        active: the subnet that runs.
        frozen: whether :meth:`freeze` was called.
        batch_ranges: whether :meth:`use_batch_ranges` was called.
    """

    active: Subnet

    def __init__(self, config: DiffusionPolicyTConfig, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Make the network with random weights, uncalibrated steps and the full-precision whole network active.

        Args:
            config: architecture.
            sizes: heads and hidden channels per block; those of ``config`` in every block if None.
        """
        full = (config.heads, config.ffn_ratio * config.dim)
        self.sizes = tuple(sizes) if sizes is not None else (full,) * config.depth
        super().__init__(config)
        self.frozen = False
        self.batch_ranges = False
        self._bits: dict[tuple[int, int], Bits] = {}
        self._plan: list[tuple[int, Width, Bits]] = []
        self.run_enter: Callable[..., tuple[Tensor, Tensor]] = ElasticDiffusionPolicyT._enter
        self.run_block: Callable[..., Tensor] = ElasticDecoderBlock.forward
        self.run_leave: Callable[..., Tensor] = ElasticDiffusionPolicyT._leave
        self.decode_block: Callable[..., Tensor] = ElasticDecoderBlock.decode
        self.activate(Subnet(tuple(Layer(h, m, 32, 32) for h, m in self.sizes), Precision.FP32))

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

    def elastic_blocks(self) -> list[ElasticDecoderBlock]:
        """The blocks in order, typed."""
        return [block for block in self.blocks if isinstance(block, ElasticDecoderBlock)]

    def activate(self, subnet: Subnet) -> None:
        """Run ``subnet`` from the next call on. No parameter is copied.

        Raises:
            ValueError: it has another number of layers, a layer wider than this network, or unknown bits; or the
                network is frozen and it is another one.
        """
        if self.frozen and subnet != self.active:
            raise ValueError("the network is frozen for inference; extract it anew to run another subnet")
        if len(subnet.layers) != len(self.sizes):
            raise ValueError(f"subnet has {len(subnet.layers)} layers, expected {len(self.sizes)}")
        arithmetic = ARITHMETIC[subnet.precision]
        plan = []
        for index, (layer, (heads, mlp)) in enumerate(zip(subnet.layers, self.sizes, strict=True)):
            if layer is None:
                continue
            if not (0 < layer.heads <= heads and 0 < layer.mlp <= mlp):
                raise ValueError(f"layer {index}: {layer} does not fit into {heads} heads and {mlp} hidden channels")
            pair = (layer.w, layer.a) if arithmetic is Arithmetic.INTEGER else (BITS[-1], BITS[-1])
            plan.append((index, Width(layer.heads, layer.mlp, arithmetic), self._select(pair)))
        self.active, self._plan = subnet, plan

    def plan(self) -> list[tuple[int, Width, Bits]]:
        """What runs: index, width and bits of every kept block."""
        return list(self._plan)

    def _select(self, pair: tuple[int, int]) -> Bits:
        if pair not in self._bits:
            if not set(pair) <= set(BITS):
                raise ValueError(f"w{pair[0]}a{pair[1]}: weight and activation bits are each one of {BITS}")
            bits = integer_bits(*pair)
            device = self.action_position.device
            self._bits[pair] = Bits(*(getattr(bits, name).to(device) for name in Bits.__slots__))
        return self._bits[pair]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ElasticDiffusionPolicyT:
        super()._apply(fn, recurse)
        self._bits = {}  # the tensors that select bits follow the parameters' device
        self.activate(self.active)
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> ElasticDiffusionPolicyT:
        """A copy with parameters of its own and the same active subnet."""
        twin = ElasticDiffusionPolicyT(self.config, self.sizes).to(self.action_position.device)
        memo[id(self)] = twin
        if self.batch_ranges:
            twin.use_batch_ranges()
        for name, module in self.named_modules():
            if isinstance(module, ElasticLinear) and module.fp8_steps is not None:
                twin.get_submodule(name).fp8_steps = module.fp8_steps.clone()
        twin.load_state_dict(self.state_dict())
        twin.activate(self.active)
        return twin.train(self.training)

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

    # Stand-alone networks --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def extract(self, subnet: Subnet) -> ElasticDiffusionPolicyT:
        """A network of its own that holds just what ``subnet`` uses and computes the same, bit for bit."""
        kept = [(index, layer) for index, layer in enumerate(subnet.layers) if layer is not None]
        config = self.config.model_copy(update={"depth": len(kept)})
        alone = ElasticDiffusionPolicyT(config, [(layer.heads, layer.mlp) for _, layer in kept])
        if self.batch_ranges:
            alone.use_batch_ranges()
        mine = self.elastic_blocks()
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("blocks.")}
        for place, (index, _) in enumerate(kept):
            target = alone.elastic_blocks()[place]
            wanted = target.state_dict()
            for name, tensor in mine[index].state_dict().items():
                if name in wanted:  # not yet the FP8 scales, which a network that was extracted itself has
                    window = tuple(slice(0, size) for size in wanted[name].shape)
                    state[f"blocks.{place}.{name}"] = tensor[window]
            for name, module in mine[index].named_modules():
                if isinstance(module, ElasticLinear):
                    part = target.get_submodule(name)
                    assert isinstance(part, ElasticLinear)
                    part.fp8_steps = module.fp8_row_steps(part.out_features).clone()
                    state[f"blocks.{place}.{name}.fp8_steps"] = part.fp8_steps
        alone.load_state_dict(state)
        alone.activate(Subnet(tuple(layer for _, layer in kept), subnet.precision))
        return alone.to(self.action_position.device).train(self.training)

    def freeze(self) -> None:
        """Prepare a stand-alone network for inference: integer layers multiply int8 codes quantized once.

        Outputs are those of the network as it was, bit for bit. Networks of other precisions stay as they are.
        """
        if self.active.precision is not Precision.INT or self.batch_ranges:  # those codes are no int8 with zero point 0
            return
        self.frozen = True
        blocks = self.elastic_blocks()
        for index, _, bits in self._plan:
            for module in blocks[index].modules():
                if isinstance(module, ElasticLinear):
                    module.freeze(bits)

    def use_batch_ranges(self, live: bool = False) -> None:
        """Quantize integer activations by BatchQuant from here on, with new corrections.

        ``live`` takes the range of every batch, as training does; else it is that estimated for the running subnet.
        """
        self.batch_ranges = True
        for quantizer in self.input_quantizers().values():
            quantizer.batch = BatchQuant().to(quantizer.log_step.device)
            quantizer.batch.live = live

    def input_quantizers(self) -> dict[str, InputQuantizer]:
        """All input quantizers by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, InputQuantizer)}

    def elastic_linears(self) -> dict[str, ElasticLinear]:
        """All elastic linear layers by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, ElasticLinear)}


def clone(network: ElasticDiffusionPolicyT) -> ElasticDiffusionPolicyT:
    """A frozen copy for averaging or teaching: evaluation mode, no gradients."""
    return copy.deepcopy(network).requires_grad_(False).eval()
