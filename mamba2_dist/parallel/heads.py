"""From all heads of a rank's own tokens to its share of the heads of all ranks' tokens, and back (arXiv 2309.14509)."""

from collections.abc import Sequence

from torch import Tensor

from .collectives import all_to_all
from .groups import Group


def to_heads(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """(batch, this rank's tokens, nheads, channels) -> (batch, all tokens, nheads / ranks, channels), tokens in the
    order of the ranks.

    lengths: tokens of each rank of `group`. One all-to-all, and one back for the gradient.
    """
    if group.size == 1:
        return x
    rows = x.unflatten(2, (group.size, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
    return all_to_all(rows, group, [x.shape[1]] * group.size, lengths).transpose(0, 1)


def to_tokens(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """The inverse of `to_heads`: (batch, all tokens, nheads / ranks, channels) -> (batch, this rank's tokens, nheads,
    channels)."""
    if group.size == 1:
        return x
    rows = all_to_all(x.transpose(0, 1), group, lengths, [lengths[group.rank]] * group.size)
    return rows.unflatten(0, (group.size, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)
