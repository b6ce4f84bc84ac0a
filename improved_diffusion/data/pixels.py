"""Batches of pixels as the network gets them."""

from __future__ import annotations

import torch as th


def to_model_range(batch: th.Tensor, device: th.device | str) -> th.Tensor:
    """A batch on the device: uint8 [N, C, H, W] becomes float32 in [-1, 1], contiguous; any other type stays as it is.

    Bytes are a quarter of the traffic, so they are converted where they are used.
    """
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != th.uint8:
        return batch
    # By a tensor: CUDA would multiply by the reciprocal of a number, which has other last bits than a division.
    half = th.full((), 127.5, device=batch.device)
    return batch.to(th.float32, memory_format=th.contiguous_format).div_(half).sub_(1)
