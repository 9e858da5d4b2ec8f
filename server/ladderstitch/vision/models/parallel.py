"""Groups of residual blocks that read one input, and whose branches are added to it.

Where blocks k..l of a stage run one after another, each adds its branch F to its input:

    x_i = act(x_{i-1} + F_i(x_{i-1}))

As a group, all branches read the group's input, and the activation follows the sum once:

    x_l = act(x_{k-1} + F_k(x_{k-1}) + ... + F_l(x_{k-1}))

This is the first-order part of the expansion of the stage (arXiv 2309.08414, 2510.03470). `act` is
ResNet's ReLU after the addition; EfficientNet has none. A group of one block is that block.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BranchBlock(nn.Module, ABC):
    """A block on maps [B, D, h, w] that adds a branch of convolutions to its input."""

    chain: tuple[str, ...]
    """Names of the branch's convolutions in order; what is between them acts on single channels."""

    @abstractmethod
    def branch(self, x: Tensor) -> Tensor:
        """Return F(x) for maps [B, D, h, w]."""

    def activate(self, x: Tensor) -> Tensor:
        """Return what leaves the block for the sum of its input and its branch."""
        return x


class ParallelGroup(nn.Module):
    """Blocks of equal shapes as a group; they stay those of their anchor, with its weights."""

    def __init__(self, blocks: Sequence[BranchBlock]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(blocks)
        self.blocks = tuple(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the group's output maps for maps [B, D, h, w]."""
        total = x
        for block in self.blocks:
            total = total + block.branch(x)
        return self.blocks[-1].activate(total)


def find_part(steps: Sequence[nn.Module], first: int, size: int) -> nn.Module:
    """Return an anchor's step, or `size` of its steps as a group."""
    if size == 1:
        return steps[first]
    return ParallelGroup([_check_block(step) for step in steps[first : first + size]])


def find_serving_part(steps: Sequence[nn.Module], first: int, size: int) -> nn.Module:
    """Return what computes the same as `find_part`, for serving: groups as one wide block each.

    A wide block has a copy of its blocks' weights. It has fewer and larger convolutions, which are
    faster on small maps (`examples/parallel-groups`).
    """
    part = find_part(steps, first, size)
    return stack(part) if isinstance(part, ParallelGroup) else part


def stack(group: ParallelGroup) -> nn.Module:
    """Return a group of n blocks as one block that is n times as wide inside.

    The first convolutions of all branches become one with n times the outputs, the last ones one
    with n times the inputs, which adds the branches; those between them become one of n times the
    groups of channels. Branches with batch normalisation that is not folded, and those that begin
    with a convolution per channel, cannot be stacked: their group is returned.
    """
    first = group.blocks[0]
    columns = [[_find_conv(block, name) for block in group.blocks] for name in first.chain]
    if columns[0][0].groups > 1 or any(conv.bias is None for convs in columns for conv in convs):
        return group
    stacked = copy.deepcopy(first)
    rules = (_stack_first, *(_stack_middle,) * (len(columns) - 2), _stack_last)
    for name, rule, convs in zip(first.chain, rules, columns, strict=True):
        setattr(stacked, name, rule(convs))
    return stacked


def _stack_first(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Return convolutions of one input as one whose outputs are those of all."""
    wide = copy.deepcopy(convs[0])
    wide.weight = _frozen(torch.cat([conv.weight for conv in convs]))
    wide.bias = _frozen(torch.cat(_biases(convs)))
    wide.out_channels *= len(convs)
    return wide


def _stack_middle(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Return convolutions as one that has the inputs and outputs of all, in groups of channels."""
    wide = _stack_first(convs)
    wide.in_channels *= len(convs)
    wide.groups *= len(convs)
    return wide


def _stack_last(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Return convolutions as one that reads the inputs of all and adds their outputs."""
    wide = copy.deepcopy(convs[0])
    wide.weight = _frozen(torch.cat([conv.weight for conv in convs], dim=1))
    wide.bias = _frozen(torch.stack(_biases(convs)).sum(0))
    wide.in_channels *= len(convs)
    return wide


def _biases(convs: Sequence[nn.Conv2d]) -> list[Tensor]:
    return [conv.bias for conv in convs if conv.bias is not None]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _find_conv(block: BranchBlock, name: str) -> nn.Conv2d:
    conv = block.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _check_block(step: nn.Module) -> BranchBlock:
    assert isinstance(step, BranchBlock), "the configuration allows groups of such blocks only"
    return step
