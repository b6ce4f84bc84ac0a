"""The command lines of guided-diffusion's readme are command lines of the scripts here."""

import pytest
from helpers import settings_of

from improved_diffusion.cli.parsing import parse
from improved_diffusion.config import UserError
from improved_diffusion.logs import logger

SAMPLE = "--batch_size 4 --num_samples 100 --timestep_respacing 250"
ADM = (
    "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True"
)
CLASSIFIER = (
    "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
    "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
)


def parsed(script, line):
    return parse(settings_of(script), line.split())


@pytest.mark.parametrize(
    "line,expected",
    [
        (
            "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
            "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
            "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True "
            "--classifier_scale 1.0 --classifier_path models/64x64_classifier.pt --classifier_depth 4 "
            f"--model_path models/64x64_diffusion.pt {SAMPLE}",
            dict(classifier_scale=1, classifier_depth=4, use_new_attention_order=True, use_ddim=False),
        ),
        (
            f"{ADM} --class_cond False --image_size 256 --noise_schedule linear --num_channels 256 "
            "--num_head_channels 64 --classifier_scale 10.0 --classifier_path models/256x256_classifier.pt "
            f"--model_path models/256x256_diffusion_uncond.pt {SAMPLE}",
            dict(classifier_scale=10, class_cond=False, num_head_channels=64),
        ),
        (
            f"--model_path model.pt --classifier_path classifier.pt {ADM} --class_cond True --image_size 128 "
            f"--num_channels 256 --num_heads 4 {CLASSIFIER} --classifier_scale 1.0 --classifier_use_fp16 True "
            "--batch_size 4 --num_samples 50000 --timestep_respacing ddim25 --use_ddim True",
            dict(use_ddim=True, classifier_use_fp16=True, classifier_pool="attention"),
        ),
    ],
)
def test_classifier_sample(line, expected):
    values = parsed("classifier_sample", line).settings.values()
    assert {name: values[name] for name in expected} == expected
    assert values["classifier_guidance"] == "published"
    assert parsed("image_sample", line).settings.values()["classifier_guidance"] == "prediction"


def test_super_res_sample():
    line = (
        f"{ADM} --class_cond True --large_size 256 --small_size 64 --noise_schedule linear --num_channels 192 "
        f"--num_heads 4 --model_path models/64_256_upsampler.pt --base_samples 64_samples.npz {SAMPLE}"
    )
    assert parsed("super_res_sample", line).settings.model.resblock_updown


def test_image_sample():
    line = (
        f"{ADM} --class_cond False --dropout 0.1 --image_size 256 --noise_schedule linear --num_channels 256 "
        f"--num_head_channels 64 --model_path models/lsun_bedroom.pt {SAMPLE}"
    )
    assert parsed("image_sample", line).settings.model.num_head_channels == 64


def test_classifier_train():
    line = (
        "--data_dir imagenet --iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4 --save_interval 10000 "
        f"--weight_decay 0.05 --val_data_dir held_out --eval_interval 5 {CLASSIFIER}"
    )
    values = parsed("classifier_train", line).settings.values()
    expected = dict(
        max_steps=300_000, lr_schedule="linear", weight_decay=0.05, val_dir="held_out", val_interval=5,
        classifier_resblock_updown=True,
    )  # fmt: skip
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("classifier_train", "learn_sigma", "True"),
        ("classifier_train", "timestep_respacing", "250"),
        ("classifier_train", "use_kl", "False"),
        ("classifier_train", "predict_xstart", "False"),
        ("classifier_train", "rescale_learned_sigmas", "False"),
        ("export", "use_fp16", "True"),
    ],
)
def test_a_flag_that_changes_nothing_is_accepted_and_the_log_says_so(script, name, value, capsys):
    command = settings_of(script)
    logger.reset()
    assert parse(command, [f"--{name}", value]) == parse(command, [])
    assert f"--{name}" in capsys.readouterr().out
    logger.reset()


def test_classifiers_train_on_noisy_images_alone():
    assert parsed("classifier_train", "--noised True").settings == parsed("classifier_train", "").settings
    with pytest.raises(UserError, match="--noised False"):
        parsed("classifier_train", "--noised False")


def test_image_nll():
    line = f"{ADM} --image_size 64 --noise_schedule cosine --num_channels 192 --num_heads 4 --model_path m.pt"
    assert parsed("image_nll", line).settings.nll.use_fp16


def test_a_published_name_sets_the_option_of_ours():
    one, other = (
        parsed("classifier_train", line)
        for line in ("--anneal_lr False --iterations 7", "--lr_schedule constant --max_steps 7")
    )
    assert one == other


def test_a_wrong_value_of_a_published_flag_is_named_with_it():
    for words, culprits in (
        ("--anneal_lr maybe", ("--anneal_lr", "maybe", "True or False")),
        ("--iterations x", ("x",)),
    ):
        with pytest.raises(UserError) as error:
            parsed("classifier_train", words)
        assert all(culprit in str(error.value) for culprit in culprits)
