"""Every row of the whole model is owned, by one rank or by the ranks that share its group."""

import numpy as np
import pytest

from mamba2_dist.parallel.partition import attention_partition, mamba2_partition

SIZES = {"d_inner": 64, "nheads": 16, "d_state": 8}


@pytest.mark.parametrize("ngroups", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_in_proj_rows(tp, ngroups):
    shares = [mamba2_partition(**SIZES, ngroups=ngroups, tp=tp, rank=rank) for rank in range(tp)]
    for index, name in enumerate(("z", "x", "B", "C", "dt")):
        parts = [share.in_proj.parts[index] for share in shares]
        assert {part.name for part in parts} == {name}
        owners = np.zeros(parts[0].size, int)
        for part in parts:
            owners[part.start : part.start + part.length] += 1
        assert (owners == parts[0].replicas).all()
        assert parts[0].replicas == (max(tp // ngroups, 1) if name in "BC" else 1)
    for rank, share in enumerate(shares):
        # a rank's heads read the groups that it holds
        heads = range(rank * share.nheads_local, (rank + 1) * share.nheads_local)
        first_group = share.in_proj.parts[2].start // SIZES["d_state"]
        assert {head * ngroups // 16 for head in heads} == set(range(first_group, first_group + share.ngroups_local))
        assert share.group_ranks * share.d_inner_local // share.ngroups_local == 64 // ngroups


@pytest.mark.parametrize(("nheads_kv", "tp", "replicas"), [(4, 2, 1), (2, 4, 2), (1, 4, 4)])
def test_key_value_heads(nheads_kv, tp, replicas):
    share = attention_partition(nheads=8, nheads_kv=nheads_kv, head_dim=4, tp=tp, rank=tp - 1)
    assert share.group_ranks == replicas
    assert share.qkv.shared == (() if replicas == 1 else ((8 // tp * 4, 4), (8 // tp * 4 + 4, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tp": 3}, r"nheads \(16\) must be divisible by tp \(3\)"),
        ({"ngroups": 2, "nheads": 6, "tp": 3}, r"ngroups \(2\) must divide tp \(3\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    sizes = {**SIZES, "ngroups": 1, "rank": 0, **change}
    sizes["d_inner"] = 4 * sizes["nheads"]
    with pytest.raises(ValueError, match=message):
        mamba2_partition(**sizes)
