"""Parameters, bits, floating point operations and size of a subnet, counted from the shape of its policy.

Size is told twice (``algorithms.md`` section 2). By the paper's convention it is parameters x bits / 8 without scales;
in real bytes it is what a packed artifact holds. The two differ in what lies outside the blocks: nominally 8 bits in a
network of integers, really :attr:`PolicyShape.fixed_bits`.
"""

from __future__ import annotations

from collections.abc import Iterator

from training.policy_shape import BlockShape, PolicyShape, linear_size
from training.subnet import FLOAT_BITS, Layer, Precision, Subnet

FIXED_BITS = 8  # nominal bits, in a network of integers, of what lies outside the blocks: never below 8
SCALE_BYTES = FLOAT_BYTES = 4


def parameters(shape: PolicyShape, subnet: Subnet) -> int:
    """Number of parameters of ``subnet``, fixed parts included; quantizer steps are not counted."""
    return shape.fixed_parameters + sum(_block_parameters(block, layer) for block, layer in _kept(shape, subnet))


def mean_bits(shape: PolicyShape, subnet: Subnet) -> float:
    """Weight bits, averaged over the quantized weights of the blocks kept (no biases, nothing outside the blocks).

    Raises:
        ValueError: the subnet keeps no block.
    """
    weights = [(_weights(block, layer, True), layer.w) for block, layer in _kept(shape, subnet)]
    total = sum(count for count, _ in weights)
    if not total:
        raise ValueError("a subnet without blocks has no mean bits")
    return sum(count * bits for count, bits in weights) / total


def flops(shape: PolicyShape, subnet: Subnet) -> tuple[int, int]:
    """Floating point operations (per chunk, per denoising step), batch 1, a multiplication and an addition being two.

    Linear layers and attention products count (masked products too, as they are computed); norms, softmax and
    activation functions do not. Attention products run at the stage of their block: once per chunk where all its
    linear layers do.
    """
    chunk, step = shape.fixed_flops_chunk, shape.fixed_flops_step
    for block, layer in _kept(shape, subnet):
        per_step = False
        for linear in block.linears:
            inputs, outputs = linear_size(block, linear, layer)
            operations = 2 * linear.tokens * inputs * outputs
            if linear.stage == "step":
                step += operations
                per_step = True
            else:
                chunk += operations
        # Scores and weighted sum, over the block's own tokens and over its memory.
        attended = block.tokens + block.memory_tokens
        products = 2 * 2 * block.tokens * attended * layer.heads * block.head_dim
        if per_step:
            step += products
        else:
            chunk += products
    return chunk, step


def paper_bytes(shape: PolicyShape, subnet: Subnet) -> int:
    """Size by the paper's convention: parameters x bits / 8, without scales.

    All parameters of a block (weights, biases, norms) count at its weight bits, its layers that are not quantized and
    everything outside the blocks at the precision of the whole network and never below 8 bits. At 32, 16 and 8 bits
    this is exactly the paper's figure; at 4 bits it is larger by half a byte for each parameter outside the blocks,
    which the paper counts at 4 bits too.
    """
    fixed = FLOAT_BITS.get(subnet.precision, FIXED_BITS)
    bits = fixed * shape.fixed_parameters
    for block, layer in _kept(shape, subnet):
        apart = _unquantized(block, layer)
        bits += layer.w * (_block_parameters(block, layer) - apart) + fixed * apart
    return _bytes(bits)


def real_bytes(shape: PolicyShape, subnet: Subnet) -> int:
    """Bytes of the packed parameters: what an artifact holds besides its graph.

    FP32 and FP16 store every parameter at 4 and 2 bytes. FP8 and integer networks pack the weights of linear layers row
    by row (two 4-bit codes to a byte), add one float32 scale per row, and keep biases and norms in
    float32; layers that are not quantized and what lies outside the blocks are stored at
    :attr:`PolicyShape.fixed_bits`. The few scales of activations are
    not counted. Kept blocks add independently of each other.
    """
    if subnet.precision in (Precision.FP32, Precision.FP16):
        return parameters(shape, subnet) * FLOAT_BITS[subnet.precision] // 8
    total = _bytes(shape.fixed_bits * shape.fixed_parameters)
    for block, layer in _kept(shape, subnet):
        total += FLOAT_BYTES * block.float_parameters + _bytes(shape.fixed_bits * _unquantized(block, layer))
        for linear in block.linears:
            if not linear.quantized:
                continue
            inputs, outputs = linear_size(block, linear, layer)
            row = _bytes(layer.w * inputs) + SCALE_BYTES + (FLOAT_BYTES if linear.bias else 0)
            total += outputs * row
    return total


def _kept(shape: PolicyShape, subnet: Subnet) -> Iterator[tuple[BlockShape, Layer]]:
    """The blocks kept, with their layers."""
    for block, layer in zip(shape.blocks, subnet.layers, strict=True):
        if layer is not None:
            yield block, layer


def _weights(block: BlockShape, layer: Layer, quantized: bool) -> int:
    """Weights of the linear layers of one block that are quantized, or of those that are not."""
    sizes = (linear_size(block, linear, layer) for linear in block.linears if linear.quantized is quantized)
    return sum(inputs * outputs for inputs, outputs in sizes)


def _unquantized(block: BlockShape, layer: Layer) -> int:
    """Weights and biases of the linear layers of one block that are not quantized."""
    biases = sum(linear.out_features for linear in block.linears if linear.bias and not linear.quantized)
    return _weights(block, layer, False) + biases


def _block_parameters(block: BlockShape, layer: Layer) -> int:
    """All parameters of one block."""
    biases = sum(linear_size(block, linear, layer)[1] for linear in block.linears if linear.bias and linear.quantized)
    return _weights(block, layer, True) + biases + _unquantized(block, layer) + block.float_parameters


def _bytes(bits: int) -> int:
    """Whole bytes that hold ``bits`` bits."""
    return -(-bits // 8)
