"""How far bits/dim from a few timesteps of each image lie from the whole bound of the same images.

    make demo                                       (the model, and the digits)
    python scripts/image_nll.py --model_path runs/digits/ema_0.99_001500.pt --data_dir data/digits/test \\
        --batch_size 99 --out_dir runs/digits_nll                    (the whole bound: 5 minutes on one core)
    python benchmarks/nll_estimate.py --model_path runs/digits/ema_0.99_001500.pt --data_dir data/digits/test \\
        --whole runs/digits_nll

For each of twenty seeds: the estimate, its standard error over the images, and the part of it that comes from the
timesteps left out. Estimates of the same images differ by that part and by the noise that is put on the images, of
which both the whole bound and the estimate have their own. So the part is also held against estimates with the whole
bound's noise, which are sums of its terms at the estimate's timesteps; and the size of the noise's part is told by
evaluating the first estimate's timesteps once more, with other noise.

Writes benchmarks/results/nll_estimate_<name>.json, and beside it the picture of the whole bound, nll_terms_<name>.png.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch as th
from common import RESULTS

from improved_diffusion import distributed
from improved_diffusion.bound import BoundSummary
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.config.settings import Likelihood
from improved_diffusion.evaluation.likelihood import BoundEvaluation, open_dataset
from improved_diffusion.logs import logger

SEEDS = range(20)


def noise_error(result, model, diffusion, dataset, batch_size):
    """The standard error of the mean over the images that the noise makes, from one repetition with other noise."""
    th.manual_seed(1)
    again = []
    for start in range(0, len(result.total_bpd), batch_size):
        rows = range(start, min(start + batch_size, len(result.total_bpd)))
        batch, kwargs = th.utils.data.default_collate([dataset[i] for i in rows])
        t, weights = (th.from_numpy(result.terms[name][rows.start : rows.stop]) for name in ("timesteps", "weights"))
        bound = diffusion.calc_bpd_loop(model, batch, model_kwargs=kwargs, timesteps=t, weights=weights)
        again.append(bound["total_bpd"].numpy())
    difference = np.concatenate(again) - result.total_bpd
    return float(np.sqrt((difference**2 / 2).sum()) / len(difference))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="runs/digits/ema_0.99_001500.pt")
    parser.add_argument("--data_dir", default="data/digits/test")
    parser.add_argument("--whole", default="runs/digits_nll", help="folder of image_nll.py's results for all timesteps")
    parser.add_argument("--nll_timesteps", type=int, default=25)
    parser.add_argument("--batch_size", type=int, default=99)
    parser.add_argument("--name", default="digits")
    args = parser.parse_args()
    whole = json.loads(Path(args.whole, "nll.json").read_text())
    with np.load(Path(args.whole, "per_image.npz"), allow_pickle=False) as arrays:
        exact, exact_terms = float(arrays["total_bpd"].mean()), arrays["vb"][:, ::-1].astype(np.float64)
    logger.configure(dir=args.whole, format_strs=[])
    asked = {
        "model_path": args.model_path, "data_dir": args.data_dir, "nll_timesteps": args.nll_timesteps,
        "num_samples": whole["images"], "batch_size": args.batch_size,
    }  # fmt: skip
    loaded = load_model(Likelihood.of(asked), asked, args.model_path)
    diffusion, model = loaded.diffusion, loaded.model.to(distributed.dev())
    dataset = open_dataset(loaded)
    rows, noise = [], None
    for seed in SEEDS:
        result = BoundEvaluation(loaded.settings.nll, seed, diffusion, dataset).run(model)
        noise = noise or noise_error(result, model, diffusion, dataset, args.batch_size)
        weights = result.terms["weights"]
        terms = np.take_along_axis(exact_terms, result.terms["timesteps"], axis=1)
        same_noise = (terms * weights).sum(axis=1) - exact_terms.sum(axis=1)
        same_error = BoundSummary(same_noise, {"vb": terms, "weights": weights}).timesteps_error
        row = dict(seed=seed, bits_per_dim=result.mean, deviation=result.mean - exact)
        row |= dict(standard_error=result.standard_error, timesteps_error=result.timesteps_error)
        row |= dict(deviation_same_noise=float(same_noise.mean()), timesteps_error_same_noise=same_error)
        rows.append(row)
        print({key: round(value, 5) for key, value in rows[-1].items()}, flush=True)
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    deviation = np.abs(column["deviation"])
    both = np.sqrt(column["timesteps_error"] ** 2 + 2 * noise**2)  # the noise of the whole bound and of the estimate
    summary = {
        "whole_bits_per_dim": exact,
        "whole_standard_error": whole["standard_error"],
        "mean_of_estimates": column["bits_per_dim"].mean(),
        "spread_of_estimates": column["bits_per_dim"].std(ddof=1),
        "standard_error": column["standard_error"].mean(),
        "timesteps_error": column["timesteps_error"].mean(),
        "noise_error": noise,
        "within_two_standard_errors": int((deviation <= 2 * column["standard_error"]).sum()),
        "within_two_timesteps_errors_same_noise": int(
            (np.abs(column["deviation_same_noise"]) <= 2 * column["timesteps_error_same_noise"]).sum()
        ),
        "within_two_timesteps_errors_other_noise": int((deviation <= 2 * column["timesteps_error"]).sum()),
        "within_two_errors_of_timesteps_and_noise": int((deviation <= 2 * both).sum()),
        "of": len(rows),
    }
    print(json.dumps(summary, indent=1))
    settings = {key: whole[key] for key in ("images", "timesteps", "model_sha256")}
    content = {"nll_timesteps": args.nll_timesteps, **settings, **summary, "rows": rows}
    shutil.copy(Path(args.whole, "nll_terms.png"), RESULTS / f"nll_terms_{args.name}.png")
    (RESULTS / f"nll_estimate_{args.name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
