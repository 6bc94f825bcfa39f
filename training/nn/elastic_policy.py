"""A policy of elastic blocks: which subnet runs, and networks of their own cut out of it, whatever its blocks compute.

A backbone derives from :class:`ElasticPolicy`, declares its blocks (:attr:`ElasticPolicy.shape`) and says how an
untrained network of some of them is made (:meth:`ElasticPolicy.blueprint`). Quantizers, calibration, the measure of a
search, and extraction need nothing else of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from training.nn.elastic import Arithmetic, Bits, ElasticBlock, ElasticLinear, InputQuantizer, Width, integer_bits
from training.policy_shape import PolicyShape
from training.quant.batchquant import BatchQuant
from training.quant.quantizer import BITS
from training.subnet import Layer, Precision, Subnet

if TYPE_CHECKING:
    from typing_extensions import Self

ARITHMETIC: Mapping[Precision, Arithmetic] = MappingProxyType(
    {
        Precision.FP32: Arithmetic.FLOAT,
        Precision.FP16: Arithmetic.HALF,
        Precision.FP8: Arithmetic.FP8,
        Precision.INT: Arithmetic.INTEGER,
    }
)

Policy = TypeVar("Policy", bound="ElasticPolicy")


class ElasticPolicy(nn.Module):
    """A network whose active subnet can be exchanged between two calls at no cost.

    A derived class calls :meth:`begin` when its blocks are there, and runs :meth:`plan` in its ``forward``.

    Attributes:
        sizes: heads and hidden channels of every block at full width.
        active: the subnet that runs.
        frozen: whether :meth:`freeze` was called.
        batch_ranges: whether :meth:`use_batch_ranges` was called.
    """

    sizes: tuple[tuple[int, int], ...]
    active: Subnet

    # What a backbone declares ----------------------------------------------------------------------------------------

    @property
    def shape(self) -> PolicyShape:
        """What search space, tables and counts know of this network; block names are its module paths."""
        raise NotImplementedError

    def blueprint(self, kept: Sequence[tuple[int, tuple[int, int]]]) -> Callable[[], Self]:
        """What makes an untrained network like this one of some of its blocks; can be pickled.

        Args:
            kept: index of each block here, ascending, with its heads and hidden channels there.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """Make the whole network active, in full precision."""
        self.frozen = False
        self.batch_ranges = False
        self._bits: dict[tuple[int, int], Bits] = {}
        self._plan: list[tuple[int, Width, Bits]] = []
        self.activate(Subnet(tuple(Layer(h, m, 32, 32) for h, m in self.sizes), Precision.FP32))

    # What runs -------------------------------------------------------------------------------------------------------

    def elastic_blocks(self) -> Sequence[ElasticBlock]:
        """The blocks in order.

        Raises:
            TypeError: the shape names a module that is none.
        """
        blocks = []
        for declared in self.shape.blocks:
            block = self.get_submodule(declared.name)
            if not isinstance(block, ElasticBlock):
                raise TypeError(f"{declared.name} is a {type(block).__name__}, expected an elastic block")
            blocks.append(block)
        return blocks

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

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _select(self, pair: tuple[int, int]) -> Bits:
        if pair not in self._bits:
            if not set(pair) <= set(BITS):
                raise ValueError(f"w{pair[0]}a{pair[1]}: weight and activation bits are each one of {BITS}")
            bits = integer_bits(*pair)
            device = self._device()
            self._bits[pair] = Bits(*(getattr(bits, name).to(device) for name in Bits.__slots__))
        return self._bits[pair]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._bits = {}  # the tensors that select bits follow the parameters' device
        self.activate(self.active)
        return self

    def input_quantizers(self) -> dict[str, InputQuantizer]:
        """All input quantizers by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, InputQuantizer)}

    def elastic_linears(self) -> dict[str, ElasticLinear]:
        """All elastic linear layers by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, ElasticLinear)}

    # Networks of their own -------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy with parameters of its own and the same active subnet."""
        twin = self.blueprint(list(enumerate(self.sizes)))().to(self._device())
        memo[id(self)] = twin
        if self.batch_ranges:
            twin.use_batch_ranges()
        for name, module in self.named_modules():
            if isinstance(module, ElasticLinear) and module.fp8_steps is not None:
                twin.get_submodule(name).fp8_steps = module.fp8_steps.clone()
        twin.load_state_dict(self.state_dict())
        twin.activate(self.active)
        return twin.train(self.training)

    @torch.no_grad()
    def extract(self, subnet: Subnet) -> Self:
        """A network of its own that holds just what ``subnet`` uses and computes the same, bit for bit."""
        kept = [(index, layer) for index, layer in enumerate(subnet.layers) if layer is not None]
        alone = self.blueprint([(index, (layer.heads, layer.mlp)) for index, layer in kept])()
        if self.batch_ranges:
            alone.use_batch_ranges()
        blocks = tuple(f"{block.name}." for block in self.shape.blocks)
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(blocks)}
        mine = self.elastic_blocks()
        for (index, _), target, declared in zip(kept, alone.elastic_blocks(), alone.shape.blocks, strict=True):
            wanted = target.state_dict()
            for name, tensor in mine[index].state_dict().items():
                if name in wanted:  # not yet the FP8 scales, which a network that was extracted itself has
                    window = tuple(slice(0, size) for size in wanted[name].shape)
                    state[f"{declared.name}.{name}"] = tensor[window]
            for name, module in mine[index].named_modules():
                if isinstance(module, ElasticLinear):
                    part = target.get_submodule(name)
                    assert isinstance(part, ElasticLinear)
                    part.fp8_steps = module.fp8_row_steps(part.out_features).clone()
                    state[f"{declared.name}.{name}.fp8_steps"] = part.fp8_steps
        alone.load_state_dict(state)
        alone.activate(Subnet(tuple(layer for _, layer in kept), subnet.precision))
        return alone.to(self._device()).train(self.training)

    def freeze(self) -> None:
        """Prepare a stand-alone network for inference: integer layers multiply int8 codes quantized once.

        Outputs are those of the network as it was, bit for bit, for layers of up to 1,024 inputs. Networks of other
        precisions stay as they are.
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


def clone(network: Policy) -> Policy:
    """A frozen copy for averaging or teaching: evaluation mode, no gradients."""
    return copy.deepcopy(network).requires_grad_(False).eval()
