"""Judge samples: FID, KID, inception score, precision, recall, density, coverage and copies, in a report."""

import os

from improved_diffusion import config, distributed
from improved_diffusion.cli.parsing import Command, parse_command
from improved_diffusion.evaluation import evaluator, report
from improved_diffusion.evaluation.sweep import AXES, run_sweep
from improved_diffusion.sampling.pipeline import Drawing
from improved_diffusion.training.run import run_folder, start_run

JUDGING = (config.JudgedConfig, config.FeaturesConfig)
SAMPLING = (
    config.SampleConfig, config.SamplerConfig, config.GuidanceConfig, config.ModelConfig, config.DiffusionConfig,
)  # fmt: skip
COMMANDS = {
    "score": Command(
        "Judge --samples, or those that --model_path draws, against --reference. What is done without a command.",
        (*JUDGING, *SAMPLING, config.RunConfig),
    ),
    "reference": Command(
        "Write the statistics of real images once, for use as --reference.",
        (config.ReferenceConfig, config.FeaturesConfig),
    ),
    "sweep": Command(
        f"Judge a model under several settings: any of --{', --'.join(AXES)} may have values separated by commas.",
        (*JUDGING, config.SweepConfig, *SAMPLING, config.RunConfig),
        lists=AXES,
    ),
    "compare": Command(
        "Show reports side by side: evaluate.py compare FOLDER FOLDER ...", (config.CompareConfig,), words="reports"
    ),
}


def score(options):
    evaluator.check_options(options)
    if options.samples:
        judge = evaluator.Judge(options)
        samples = judge.open_samples(options.samples)
        options.out_dir = options.out_dir or evaluator.report_folder(options.samples)
        judge.check_out_dir(options.out_dir, samples.path)
        out_dir = start_run(options, "")
        judge.prepare()
        return judge.judge(samples, out_dir)
    drawing = Drawing(options)
    evaluator.settle_for(options, options)
    judge = evaluator.Judge(options)
    judge.expect_drawn()
    judge.check_out_dir(run_folder(options, drawing.name))
    out_dir = start_run(options, drawing.name)
    judge.prepare()  # before the samples: what is wrong with it comes out now
    return judge.judge(judge.open_samples(drawing.write(out_dir)), out_dir)


def compare(options):
    paths = config.comma_list(options.reports, str.strip)
    if len(paths) < 2:
        raise config.UserError("name two reports or more: evaluate.py compare FOLDER FOLDER")
    reports = [report.read(path) for path in paths]
    names = [os.path.basename(os.path.abspath(each["folder"])) for each in reports]
    names = names if len(set(names)) == len(names) else paths
    print(report.comparison(reports, names).replace("±", "+-"), end="")
    if options.out_dir:
        print(f"wrote {report.write_comparison(options.out_dir, reports, names)}")


def main():
    name, options = parse_command(COMMANDS, __doc__, default="score")
    distributed.setup_dist()
    if name == "compare":
        return distributed.from_rank0(compare, options)
    {"score": score, "reference": evaluator.write_reference, "sweep": run_sweep}[name](options)


if __name__ == "__main__":
    distributed.run_script(main)
