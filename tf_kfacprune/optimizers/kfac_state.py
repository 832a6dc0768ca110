"""What K-FAC keeps besides the weights: bindings, and the variables of each Kronecker block.

Plain objects on purpose: the optimizer tracks every variable that it creates, and Keras would
track these containers a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import keras

from tf_kfacprune.curvature import KroneckerBlock
from tf_kfacprune.optimizers.block_states import BlockState
from tf_kfacprune.optimizers.factors import Factor
from tf_kfacprune.optimizers.split_factors import SplitFactor

__all__ = ["Binding", "Layout", "summary_lines"]

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
        self.in_blocks = [index for state in states for index in state.indices]
        members = set(self.in_blocks)
        self.rest = [i for i in range(num_variables) if i not in members]
        self.velocities: dict[int, keras.Variable] = {}


def summary_lines(
    name: str, layout: Layout, binding: Binding, variables: Sequence[keras.Variable]
) -> Iterator[str]:
    """What takes K-FAC steps, with memory, and what takes Adam steps, with the reason."""
    yield f"{name}: {len(layout.states)} Kronecker blocks"
    for state in layout.states:
        block = state.block
        times = f"{block.group_shape[0]} x " if block.group_shape else ""
        size = f"A {times}{_size(state.a)}, G {times}{_size(state.g)}"
        note = f"  above max_factor_dim: {', '.join(state.capped)}" * bool(state.capped)
        yield f"  {block.name:<24} {size:<36} {_mebibytes(state.bytes)}{note}"
    total = sum(state.bytes for state in layout.states)
    yield f"  factors and inverses in all: {_mebibytes(total)}"
    yield f"Adam steps: {len(layout.rest)} variables"
    for index in layout.rest:
        variable = variables[index]
        count = f"{math.prod(variable.shape):,} parameters"
        yield f"  {variable.path:<32} {count:<20} {binding.reason(variable)}"


def _size(factor: Factor | SplitFactor) -> str:
    if isinstance(factor, SplitFactor):
        most = max(factor.sizes)
        return f"{len(factor.sizes)} blocks of up to {most}x{most}"
    return f"diag {factor.n}" if factor.is_diagonal else f"{factor.n}x{factor.n}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
