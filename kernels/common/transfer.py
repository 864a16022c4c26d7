"""From the host to a device without waiting for it."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor | list, device: torch.device) -> Tensor:
    """A tensor of host values on `device`; the copy to a GPU runs behind the caller's back, from pinned memory."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
