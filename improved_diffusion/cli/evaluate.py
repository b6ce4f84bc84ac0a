"""Evaluate samples: scores in a report, statistics of real images, sweeps, and reports side by side."""

from ..config import SWEEP_OPTIONS
from ..config.settings import Comparison, ReferenceStatistics, Scoring, Sweeping
from .command import Command, CommandGroup

FIRST = ("reference", "held_out", "train_dir", "features", "trust_features", "resize")
COMMAND = CommandGroup(
    "Evaluate samples: FID, KID, inception score, precision, recall, density, coverage and copies, in a report.",
    {
        "score": Command(
            "Evaluate --samples, or those that --model_path draws, against --reference. The default command.",
            Scoring, "evaluate:score",
            first=("samples", "model_path", *FIRST, "num_samples", "sampler", "steps", "out_dir"),
        ),
        "reference": Command(
            "Write the statistics of real images once, for use as --reference.", ReferenceStatistics,
            "evaluate:reference",
        ),
        "sweep": Command(
            f"Evaluate a model with several values, comma-separated, of any of: {', '.join(SWEEP_OPTIONS)}.",
            Sweeping, "evaluate:sweep", first=("model_path", *FIRST, "num_samples", *SWEEP_OPTIONS, "out_dir"),
            lists=SWEEP_OPTIONS,
        ),
        "compare": Command(
            "Show reports side by side: evaluate compare FOLDER FOLDER ...", Comparison, "evaluate:compare",
            words="reports",
        ),
    },
    default="score",
)  # fmt: skip
