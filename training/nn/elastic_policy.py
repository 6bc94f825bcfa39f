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
from training.policy_shape import BlockShape, PolicyShape, linear_size
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
        self._resolved = _declared_blocks(self)
        self.frozen = False
        self.batch_ranges = False
        self._bits: dict[tuple[int, int], Bits] = {}
        self._plan: list[tuple[int, Width, Bits]] = []
        self.activate(Subnet(tuple(Layer(h, m, 32, 32) for h, m in self.sizes), Precision.FP32))

    # What runs -------------------------------------------------------------------------------------------------------

    def elastic_blocks(self) -> tuple[ElasticBlock, ...]:
        """The blocks in order."""
        return self._resolved

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

    def filled(self, state: Mapping[str, Tensor], batch_ranges: bool) -> Self:
        """This untrained network with its weights, buffers and FP8 scales from ``state``, whose tensors it takes over.

        Args:
            state: by name, of the device and type that they are to have.
            batch_ranges: whether the network that they are of quantizes by BatchQuant (:meth:`use_batch_ranges`).
        """
        if batch_ranges and not self.batch_ranges:
            self.use_batch_ranges()
        for name, value in state.items():
            owner, _, kind = name.rpartition(".")
            if kind == FP8_STEPS:
                self.get_submodule(owner).register_buffer(FP8_STEPS, value)
        self.load_state_dict(dict(state), assign=True)
        return self.to(next(iter(state.values())).device)  # buffers that are not in the state

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy with parameters of its own: of the same types, active subnet, mode and use."""
        twin = self.blueprint(list(enumerate(self.sizes)))()
        memo[id(self)] = twin
        twin.filled({name: value.clone() for name, value in self.state_dict().items()}, self.batch_ranges)
        for mine, other in zip(self.parameters(), twin.parameters(), strict=True):
            other.requires_grad_(mine.requires_grad)
        for own, copied in zip(self.input_quantizers().values(), twin.input_quantizers().values(), strict=True):
            if own.batch is not None and copied.batch is not None:
                copied.batch.live = own.batch.live
        twin.activate(self.active)
        if self.frozen:
            twin.freeze()
        return twin.train(self.training)

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


def _declared_blocks(policy: ElasticPolicy) -> tuple[ElasticBlock, ...]:
    """The modules that the shape names, which are as it says."""
    shape, blocks = policy.shape, []
    if len(policy.sizes) != len(shape.blocks):
        raise ValueError(
            f"sizes: expected one for each of {len(shape.blocks)} declared blocks, got {len(policy.sizes)}"
        )
    for declared, size in zip(shape.blocks, policy.sizes, strict=True):
        try:
            block = policy.get_submodule(declared.name)
        except AttributeError as error:
            raise ValueError(f"{declared.name}: declared as a block, but the policy has no such module") from error
        if not isinstance(block, ElasticBlock):
            raise ValueError(f"{declared.name}: declared as a block, but is a {type(block).__name__}, no ElasticBlock")
        _check_linears(declared, block, Layer(*size, 32, 32))
        blocks.append(block)
    return tuple(blocks)


def _check_linears(declared: BlockShape, block: ElasticBlock, layer: Layer) -> None:
    found = {name: module for name, module in block.named_modules() if isinstance(module, ElasticLinear)}
    quantized = {linear.name: linear for linear in declared.linears if linear.quantized}
    for name in sorted(found.keys() ^ quantized.keys()):
        what = "declared, but no ElasticLinear" if name in quantized else "an ElasticLinear that is not declared"
        raise ValueError(f"{declared.name}.{name}: {what}")
    for name, linear in quantized.items():
        wanted = (*linear_size(declared, linear, layer), linear.bias)
        module = found[name]
        if wanted != (module.in_features, module.out_features, module.bias is not None):
            raise ValueError(f"{declared.name}.{name}: declared with inputs, outputs and bias {wanted}, is {module}")
    units = block.units().values()
    for part, modules, names in (
        (
            "producers",
            [m for u in units for m in u.producers],
            {n for n, s in quantized.items() if s.out_slice != "full"},
        ),
        (
            "consumers",
            [m for u in units for m in u.consumers],
            {n for n, s in quantized.items() if s.in_slice != "full"},
        ),
    ):
        given = {name for name, module in found.items() if any(module is other for other in modules)}
        if given != names:
            raise ValueError(
                f"{declared.name}: {part} of its units are {sorted(given)}, but the shape slices {sorted(names)}"
            )
