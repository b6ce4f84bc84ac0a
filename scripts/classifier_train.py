"""Train a classifier of noisy images, to guide a diffusion model (Dhariwal & Nichol 2021)."""

from improved_diffusion import distributed
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import (
    ClassifierConfig,
    DataConfig,
    GuidedModelConfig,
    ProcessConfig,
    ProgressConfig,
    RunConfig,
    TrainConfig,
)
from improved_diffusion.logs import logger
from improved_diffusion.training.classifier import adopt_process, build_classifier, build_classifier_validation
from improved_diffusion.training.run import open_training_data, prepare_training, start_run, train


def main():
    groups = (DataConfig, TrainConfig, ProgressConfig, GuidedModelConfig, ClassifierConfig, ProcessConfig, RunConfig)
    options = parse_options(groups, __doc__)
    options.class_cond = True  # the images' classes are read, as for a conditional model
    start_run(options, "classifier_train")
    adopt_process(options)
    metadata = prepare_training(options)
    data = open_training_data(options, metadata)

    def hooks(objective):
        return build_classifier_validation(options, objective, data.class_names)

    logger.log("training...")
    train(options, data, data.class_names, hooks, build_classifier)


if __name__ == "__main__":
    distributed.run_script(main)
