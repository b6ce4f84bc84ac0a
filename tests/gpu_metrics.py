"""The metrics of the same features on the GPU and on the CPU: `gpu_metrics.py`. Run by test_gpu.py."""

import numpy as np
import torch as th

from improved_diffusion.evaluation.metrics import kid, neighbours
from improved_diffusion.evaluation.metrics.copies import nearest
from improved_diffusion.evaluation.metrics.frechet import frechet_distance, moments
from improved_diffusion.evaluation.metrics.inception_score import inception_score
from improved_diffusion.evaluation.metrics.kid import kernel_distance
from improved_diffusion.evaluation.metrics.manifold import manifold_scores


def features(rows, width, seed, shift=0.0):
    """At least 0, as those behind a ReLU, with some rows twice."""
    x = np.maximum(np.random.default_rng(seed).normal(shift, 1, (rows, width)), 0).astype(np.float32)
    x[:20] = x[20:40]
    return x


def measured(samples, real, device):
    """Every number of every metric, by name."""
    logits = 3 * samples[:, :10].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    of_samples, of_real = moments(samples, device), moments(real, device)
    distances, rows = nearest(samples, real, device)
    return {
        "mean": of_samples.mu,
        "covariance": of_samples.sigma,
        "frechet": frechet_distance(of_samples, of_real, device),
        "kid": kernel_distance(samples, real, device=device),
        "inception score": inception_score(probabilities, device=device),
        "manifold": manifold_scores(samples, real, device=device),
        "nearest": distances,
        "their distances": ((samples - real[rows]) ** 2).sum(axis=1, dtype=np.float64),
    }


def main():
    th.set_float32_matmul_precision("medium")  # as a run that allows TF32: the metrics do not take it
    for rows, width in ((700, 48), (300, 7), (500, 1001)):
        samples, real = features(rows, width, 1, shift=0.1), features(rows + 13, width, 2)
        real[-30:] = samples[:30]
        on_cpu = measured(samples, real, "cpu")
        for sizes in (1 << 28, 5000):  # one block, many blocks
            neighbours.ON_ACCELERATOR, kid.ON_ACCELERATOR = sizes, max(sizes >> 16, 100)
            on_gpu = measured(samples, real, "cuda")
            for name, value in on_cpu.items():
                np.testing.assert_allclose(on_gpu[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
            assert on_gpu["manifold"] == on_cpu["manifold"], "balls have the same edges on both"
            np.testing.assert_array_equal(on_gpu["nearest"], on_cpu["nearest"])


if __name__ == "__main__":
    main()
