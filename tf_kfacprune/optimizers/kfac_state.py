"""What K-FAC keeps besides the weights: bindings, and the variables of each Kronecker block.

Plain objects on purpose: the optimizer tracks every variable that it creates, and Keras would
track these containers a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras

from tf_kfacprune.curvature import KroneckerBlock

__all__ = ["Binding", "BlockState", "Layout", "summary_lines"]

NO_BLOCK = "not a kernel or bias of a layer with a Kronecker block"
NOT_BOUND = "the model does not hand Kronecker factors to its optimizer"


class Binding:
    """What a model bound the optimizer to: its blocks, or None before it did, and the rest."""

    def __init__(
        self, blocks: tuple[KroneckerBlock, ...] | None, reasons: Mapping[str, str]
    ) -> None:
        self.blocks = blocks
        self.reasons = dict(reasons)

    def reason(self, variable: keras.Variable) -> str:
        """Why a variable takes Adam steps."""
        if self.blocks is None:
            return NOT_BOUND
        return self.reasons.get(variable.path, NO_BLOCK)


class Layout:
    """Which variable takes which kind of step."""

    def __init__(self, states: list[BlockState], num_variables: int) -> None:
        self.states = states
        in_blocks = {index for state in states for index in state.indices}
        self.rest = [i for i in range(num_variables) if i not in in_blocks]
        self.velocities: dict[int, keras.Variable] = {}


class BlockState:
    """Optimizer variables of one Kronecker block and the places of its weights."""

    def __init__(
        self,
        block: KroneckerBlock,
        index_of: Mapping[int, int],
        add_variable: Callable[..., keras.Variable],
    ) -> None:
        self.block = block
        self.kernel_index = index_of[id(block.kernel)]
        self.bias_index = None if block.bias is None else index_of[id(block.bias)]

        def square(kind: str, n: int, initializer: str) -> keras.Variable:
            name = f"{block.name}_{kind}"
            return add_variable((n, n), initializer, dtype="float32", name=name)

        self.a = square("factor_a", block.n_a, "zeros")
        self.g = square("factor_g", block.n_out, "zeros")
        self.a_inverse = square("inverse_a", block.n_a, "identity")
        self.g_inverse = square("inverse_g", block.n_out, "identity")

    @property
    def indices(self) -> list[int]:
        """Places of kernel and bias among the trainable variables."""
        return [i for i in (self.kernel_index, self.bias_index) if i is not None]

    @property
    def bytes(self) -> int:
        """Memory of factors and inverses."""
        return 4 * 2 * (self.block.n_a**2 + self.block.n_out**2)


def summary_lines(
    name: str, layout: Layout, binding: Binding, variables: Sequence[keras.Variable]
) -> Iterator[str]:
    """What takes K-FAC steps, with memory, and what takes Adam steps, with the reason."""
    yield f"{name}: {len(layout.states)} Kronecker blocks"
    for state in layout.states:
        block = state.block
        size = f"A {block.n_a}x{block.n_a}, G {block.n_out}x{block.n_out}"
        yield f"  {block.name:<24} {size:<28} {_mebibytes(state.bytes)}"
    total = sum(state.bytes for state in layout.states)
    yield f"  factors and inverses in all: {_mebibytes(total)}"
    yield f"Adam steps: {len(layout.rest)} variables"
    for index in layout.rest:
        variable = variables[index]
        count = f"{math.prod(variable.shape):,} parameters"
        yield f"  {variable.path:<32} {count:<20} {binding.reason(variable)}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
