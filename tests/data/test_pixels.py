"""Batches of bytes become what the network gets."""

import numpy as np
import pytest
import torch as th

from improved_diffusion.data.pixels import to_model_range

BYTES = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8).repeat(3, axis=1)


@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
def test_every_byte_becomes_the_published_number(memory_format):
    batch = th.from_numpy(BYTES).to(memory_format=memory_format)
    found = to_model_range(batch, th.device("cpu"))
    np.testing.assert_array_equal(found.numpy(), BYTES.astype(np.float32) / 127.5 - 1)
    assert found.dtype == th.float32 and found.is_contiguous() and batch.dtype == th.uint8


@pytest.mark.parametrize("dtype", [th.float32, th.float64, th.bfloat16])
def test_other_batches_stay_as_they_are(dtype):
    batch = th.randn(2, 3, 4, 4).to(dtype)
    assert to_model_range(batch, "cpu") is batch
