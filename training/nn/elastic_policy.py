"""A policy of elastic blocks: which subnet runs, and networks of their own cut out of it, whatever its blocks compute.

A backbone derives from :class:`ElasticPolicy`, declares its blocks (:attr:`ElasticPolicy.shape`) and says how an
untrained network of some of them is made (:meth:`ElasticPolicy.blueprint`). Quantizers, calibration, the measure of a
search, and extraction need nothing else of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from training.nn.declaration import check_declaration
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

FP8_STEPS = "fp8_steps"  # buffer of a layer that was cut out of a larger one

Policy = TypeVar("Policy", bound="ElasticPolicy")


class ElasticPolicy(nn.Module):
    """A network whose active subnet can be exchanged between two calls at no cost.

    A derived class calls :meth:`begin` when its blocks are there, and runs :meth:`plan` in its ``forward``. All its
    parameters are on one device and, where they are trained or quantized, float32; autocast makes products BF16.

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
        """Make the whole network active, in full precision.

        Raises:
            ValueError: blocks and declaration do not agree; the message names the module.
        """
        self._block_names = tuple(block.name for block in self.shape.blocks)
        check_declaration(self)
        self.frozen = False
        self.batch_ranges = False
        self._bits: dict[tuple[int, int], Bits] = {}
        self._plan: list[tuple[int, Width, Bits]] = []
        self.activate(Subnet(tuple(Layer(h, m, 32, 32) for h, m in self.sizes), Precision.FP32))

    # What runs -------------------------------------------------------------------------------------------------------

    def elastic_blocks(self) -> tuple[ElasticBlock, ...]:
        """The blocks in order."""
        blocks = (self.get_submodule(name) for name in self._block_names)
        return cast(tuple[ElasticBlock, ...], tuple(blocks))  # begin() has looked

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

    @property
    def live_ranges(self) -> bool:
        """Whether BatchQuant takes the range of every batch, as in training."""
        return any(q.batch is not None and q.batch.live for q in self.input_quantizers().values())

    def filled(self, state: Mapping[str, Tensor], batch_ranges: bool = False, live: bool = False) -> Self:
        """This untrained network with its weights, buffers and FP8 scales from ``state``, whose tensors it takes over.

        Args:
            state: by name, of the device and type that they are to have.
            batch_ranges: whether the network that they are of quantizes by BatchQuant (:meth:`use_batch_ranges`).
            live: and takes the range of every batch.
        """
        if batch_ranges:
            self.use_batch_ranges(live)
        for name, value in state.items():
            owner, _, kind = name.rpartition(".")
            if kind == FP8_STEPS:
                self.get_submodule(owner).register_buffer(FP8_STEPS, value)
        self.to(next(iter(state.values())).device)  # buffers that are not in the state
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name in state:
                tensor.data = state[name]  # parameters that share one tensor go on doing so
        self.load_state_dict(dict(state))
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy with parameters of its own: of the same types, active subnet, mode and use."""
        twin = self.blueprint(list(enumerate(self.sizes)))()
        memo[id(self)] = twin
        state = {name: value.clone() for name, value in self.state_dict().items()}
        twin.filled(state, self.batch_ranges, self.live_ranges)
        self._give_types(twin)
        for mine, other in zip(self.parameters(), twin.parameters(), strict=True):
            other.requires_grad_(mine.requires_grad)
        twin.activate(self.active)
        if self.frozen:
            twin.freeze()
        return twin.train(self.training)

    def _give_types(self, twin: ElasticPolicy) -> None:
        """Buffers of ``twin`` that no state holds, such as masks, get the types that they have here."""
        mine = dict(self.named_buffers())
        for name, buffer in twin.named_buffers():
            if name in mine and buffer.dtype != mine[name].dtype:
                buffer.data = buffer.to(mine[name].dtype)

    @torch.no_grad()
    def extract(self, subnet: Subnet) -> Self:
        """A network of its own that holds just what ``subnet`` uses and computes the same, bit for bit.

        Its parameters can be trained, whatever those of this network are.
        """
        kept = [(index, layer) for index, layer in enumerate(subnet.layers) if layer is not None]
        alone = self.blueprint([(index, (layer.heads, layer.mlp)) for index, layer in kept])()
        names = [block.name for block in self.shape.blocks]
        inside = tuple(f"{name}." for name in names)
        state = {name: value for name, value in self.state_dict().items() if not name.startswith(inside)}
        mine = self.elastic_blocks()
        if self.batch_ranges:
            alone.use_batch_ranges()
        for (index, _), target, declared in zip(kept, alone.elastic_blocks(), alone.shape.blocks, strict=True):
            wanted = target.state_dict()
            for name, value in mine[index].state_dict().items():
                if name in wanted:  # not FP8 scales, which a network that was extracted itself has
                    state[f"{declared.name}.{name}"] = value[tuple(slice(0, size) for size in wanted[name].shape)]
            for name, module in mine[index].named_modules():
                if isinstance(module, ElasticLinear):
                    rows = len(wanted[f"{name}.weight"])
                    state[f"{declared.name}.{name}.{FP8_STEPS}"] = module.fp8_row_steps(rows)
        alone.filled({name: value.clone() for name, value in state.items()}, self.batch_ranges)
        self._give_types(alone)
        alone.activate(Subnet(tuple(layer for _, layer in kept), subnet.precision))
        return alone.train(self.training)

    def freeze(self) -> None:
        """Prepare a stand-alone network for inference: integer layers multiply int8 codes quantized once.

        Outputs are those of the network as it was, bit for bit, for layers of up to 1,024 inputs. Networks of other
        precisions stay as they are.

        Raises:
            ValueError: the active subnet is not the whole network.
        """
        if [(width.heads, width.mlp) for _, width, _ in self._plan] != list(self.sizes):
            raise ValueError("only a stand-alone network can be frozen; extract the active subnet first")
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
    """A frozen copy for averaging or teaching: evaluation mode, no gradients, estimated BatchQuant ranges."""
    twin = copy.deepcopy(network).requires_grad_(False).eval()
    for quantizer in twin.input_quantizers().values():
        if quantizer.batch is not None:
            quantizer.batch.live = False
    return twin
