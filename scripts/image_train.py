"""Train a diffusion model on images."""

from improved_diffusion import distributed
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, RunConfig, TrainConfig, WatchConfig
from improved_diffusion.logs import logger
from improved_diffusion.training.preview import build_previews
from improved_diffusion.training.run import open_training_data, prepare_training, start_run, train
from improved_diffusion.training.validation import build_validation


def main():
    options = parse_options((DataConfig, TrainConfig, WatchConfig, ModelConfig, DiffusionConfig, RunConfig), __doc__)
    start_run(options, options.preset or "image_train")
    metadata = prepare_training(options)
    data = open_training_data(options, metadata)

    def hooks(diffusion):
        return build_previews(options, diffusion, data) + build_validation(options, diffusion, data.class_names)

    logger.log("training...")
    train(options, data, data.class_names, hooks)


if __name__ == "__main__":
    distributed.run_script(main)
