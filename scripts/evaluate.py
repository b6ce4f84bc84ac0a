"""Judge samples: FID, KID, inception score, precision, recall, density, coverage and copies, in a report."""

import os

from improved_diffusion import config, dist_util, judging, report
from improved_diffusion.command_line import Command, parse_command
from improved_diffusion.drawing import Drawing
from improved_diffusion.run_util import run_folder, start_run
from improved_diffusion.sweep import AXES, run_sweep

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
    judging.check_options(options)
    if options.samples:
        judge = judging.Judge(options)
        samples = judge.open_samples(options.samples)
        options.out_dir = options.out_dir or judging.report_folder(options.samples)
        judge.check_out_dir(options.out_dir, samples.path)
        out_dir = start_run(options, "")
        judge.prepare()
        return judge.judge(samples, out_dir)
    drawing = Drawing(options)
    judging.settle_for(options, options)
    judge = judging.Judge(options)
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
    dist_util.setup_dist()
    if name == "compare":
        return dist_util.from_rank0(compare, options)
    {"score": score, "reference": judging.write_reference, "sweep": run_sweep}[name](options)


if __name__ == "__main__":
    dist_util.run_script(main)
