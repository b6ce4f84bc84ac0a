"""benchmarks/service_load.py counts every image that is not the model's own."""

import numpy as np

from benchmarks.service_load import count_wrong


def test_wrong_images_are_counted_in_requests_and_in_single_images():
    expected = [np.arange(8).reshape(2, 4), np.arange(8, 16).reshape(2, 4)]
    requests = [dict(seed=0, n=2), dict(seed=1, n=2)]
    singles = [dict(seed=seed, seeds=str(i)) for seed in (0, 1) for i in (0, 1)]
    assert count_wrong(expected, requests, expected) == 0
    each = [images[i : i + 1] for images in expected for i in (0, 1)]
    assert count_wrong(each, singles, expected) == 0
    assert count_wrong([each[0], each[0], each[3], each[3]], singles, expected) == 2
    assert count_wrong([expected[0], expected[0]], requests, expected) == 2
