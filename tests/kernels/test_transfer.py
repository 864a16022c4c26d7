"""What is kept on a device between calls."""

import pytest
import torch
from mamba2_dist.kernels.common.transfer import Kept, to_device

VALUES = torch.arange(1000)


def test_made_once_until_others_push_it_out():
    made, kept = [], Kept(capacity=2)
    for key in (1, 2, 1, 3, 1, 2):
        kept.get(key, lambda key=key: made.append(key) or key)
    assert made == [1, 2, 3, 2]


@pytest.mark.gpu
def test_another_stream_waits_for_the_copy():
    device, kept = torch.device("cuda"), Kept()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.full((1000,), -1, device=device)  # what its memory may hold before
    with torch.cuda.stream(first):
        torch.cuda._sleep(1 << 28)
        kept.get("values", lambda: to_device(VALUES, device))
    with torch.cuda.stream(second):
        seen = kept.get("values", lambda: None).clone()
    assert not first.query()
    second.synchronize()
    assert torch.equal(seen.cpu(), VALUES)


@pytest.mark.gpu
def test_no_copy_from_the_host_in_a_graph():
    device, kept = torch.device("cuda"), Kept(capacity=1)
    values = kept.get("before", lambda: to_device(VALUES, device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = 2 * kept.get("before", lambda: None)
        again = Kept()
        again.get("before", lambda held=values: held)
        with pytest.raises(RuntimeError, match="once before capturing"):
            kept.get("within", lambda: to_device(VALUES, device))
    kept.get("after", lambda: None)
    # pushed out, but for the graph
    assert "before" not in kept.values
    assert torch.equal(again.get("before", lambda: None).cpu(), VALUES)
    del values, again
    torch.full((1000,), -1, device=device)
    graph.replay()
    assert torch.equal(doubled.cpu(), 2 * VALUES)
