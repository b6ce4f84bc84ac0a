"""Which of a preset's options a command takes."""

import pytest

from improved_diffusion.config import UserError
from improved_diffusion.config.presets import PRESETS, options_for, presets_like
from improved_diffusion.config.settings import (
    Distilling,
    Exporting,
    ImageDistillation,
    ImageSampling,
    Pushing,
    SuperResDistillation,
    SuperResSampling,
)

CLASSIFIERS = {name for name in PRESETS if name.startswith("adm-classifier")}


@pytest.mark.parametrize("kind", [Distilling, Exporting, Pushing])
def test_commands_for_models_of_any_kind_take_the_presets_of_images_and_of_super_resolution(kind):
    for name in PRESETS.keys() - CLASSIFIERS:
        kind.of(options_for(name, kind))
    for name in CLASSIFIERS:
        with pytest.raises(UserError, match="is for the classifier commands"):
            options_for(name, kind)


@pytest.mark.parametrize("kind, name", [(SuperResSampling, "cifar10-hybrid"), (ImageSampling, "upsample64-256")])
def test_the_other_commands_take_those_of_their_kind(kind, name):
    with pytest.raises(UserError, match=f"--preset {name} is for the"):
        options_for(name, kind)


def test_a_distillation_takes_the_teachers_network_and_batch_but_not_how_it_was_trained():
    taken = options_for("ddpm-cifar10", Distilling)
    model = dict(image_size=32, num_heads=1, noise_schedule="linear", dropout=0.1)
    assert taken.items() >= {**model, "random_flip": True, "total_batch_size": 128}.items()
    assert not {"lr", "max_steps", "ema_rate", "adam_eps", "lr_warmup_steps"} & taken.keys()
    assert "schedule_sampler" not in options_for("cifar10-vlb", Distilling)


@pytest.mark.parametrize("kind", [ImageSampling, ImageDistillation])
def test_a_network_without_a_description_is_recognised_by_its_shapes(kind):
    found = presets_like(dict(num_channels=128, num_res_blocks=3, learn_sigma=True, class_cond=False), kind)
    assert {"cifar10-hybrid", "cifar10-vlb", "imagenet64-vlb"} <= set(found) and "ddpm-cifar10" not in found
    shapes = dict(num_channels=192, learn_sigma=True, class_cond=True, resblock_updown=False)
    assert presets_like(shapes, SuperResDistillation) == ["upsample64-256"]
