"""How good the samples of models are in very few steps: students of `improved-diffusion distill`, and their teacher.

    python datasets/digits.py --out_dir data/digits
    improved-diffusion distill --teacher runs/digits --data_dir data/digits/train --max_steps 800 --lr 1e-3 \\
        --out_dir runs/digits_fast
    python benchmarks/few_steps.py --model_path runs/digits,runs/digits_fast --data_dir data/digits --num_samples 500

runs/digits is the demo's (make demo). The measures are those of sampler_quality.py: the kernel distance to all real
images in the features of a classifier that is trained here on the real training images, and how often that classifier
sees the class that was asked for. Writes benchmarks/results/few_steps_<name>.json and prints the table.
"""

import json

import numpy as np
from common import RESULTS, Checkpoint, Classifier, parser, real_images

from improved_diffusion.evaluation.metrics.kid import kernel_distance

STEPS = (1, 2, 4, 8)


def measure(path, steps, args, extractor, reference):
    """A row: a model in so many steps."""
    flags = ["--sampler", args.sampler, "--timestep_grid", args.timestep_grid, "--steps", str(steps)]
    samples = Checkpoint(path, args.batch_size).draw(flags, args.num_samples)
    features, probabilities = extractor.evaluate(samples.images)
    kid = kernel_distance(features, reference)
    agreement = float((probabilities.argmax(axis=1) == samples.labels).mean())
    return dict(model=path, steps=steps, kid=kid.value, standard_error=kid.standard_error, agreement=agreement)


def table(rows):
    """Markdown: a row for each model, a column for each number of steps."""
    lines = ["| model | " + " | ".join(map(str, STEPS)) + " |", "|---|" + "---|" * len(STEPS)]
    for path in dict.fromkeys(row["model"] for row in rows):
        cells = [
            f"{1e3 * row['kid']:.1f} ± {1e3 * row['standard_error']:.1f}, {row['agreement']:.1%}"
            for row in rows
            if row["model"] == path
        ]
        lines.append(f"| {path} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    args = parser(__doc__)
    args.add_argument("--sampler", default="renoise")
    args.add_argument("--timestep_grid", default="auto")
    args = args.parse_args()
    paths = args.model_path.split(",")
    first = Checkpoint(paths[0], args.batch_size)
    sets = [real_images(f"{args.data_dir}/{part}", first.image_size, first.channels) for part in ("train", "test")]
    extractor = Classifier(first.channels, first.classes).fit(*sets[0])
    accuracy = (extractor.evaluate(sets[1][0])[1].argmax(axis=1) == sets[1][1]).mean()
    print(f"the classifier's accuracy on the real test images: {accuracy:.1%}")
    reference, _ = extractor.evaluate(np.concatenate([images for images, _ in sets]))
    rows = [measure(path, steps, args, extractor, reference) for path in paths for steps in STEPS]
    content = {
        "settings": dict(num_samples=args.num_samples, sampler=args.sampler, timestep_grid=args.timestep_grid),
        "rows": rows,
    }
    (RESULTS / f"few_steps_{args.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"kernel distance x 1000 and agreement, {args.num_samples} samples by steps of {args.sampler}:")
    print(table(rows))


if __name__ == "__main__":
    main()
