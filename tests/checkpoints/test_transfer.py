"""Starting from another model's weights, and folders in place of files."""

import pytest
import torch as th
from model_helpers import CLASSES, TINY, save_checkpoint, tiny_settings
from script_helpers import write_images

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.checkpoints.transfer import load_fitting, take_network
from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageTraining, SuperResTraining
from improved_diffusion.models.build import build_model_and_diffusion

RUN = dict(num_workers=0, batch_size=2, max_steps=1, lr=1e-12, ema_rate="0.5")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "photos", 6)


@pytest.fixture
def source(tmp_path):
    return str(save_checkpoint(tmp_path / "source/ema_0.9_000010.pt", tiny_settings()))


def finetune(photos, source, out, **options):
    """(the new model, its state dict, the source's)."""
    model = idf.train(photos, init_checkpoint=source, out_dir=str(out), **RUN, **options)
    before, _ = checkpoint.load(source) if source.endswith(".pt") else ({}, {})
    return model, model.network.state_dict(), before


def same(one, other):
    return th.allclose(one, other, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(image_size=16),
        dict(diffusion_steps=40, noise_schedule="sigmoid"),
        dict(predict_v=True),
        dict(dropout=0.2),
    ],
)  # fmt: skip
def test_another_size_schedule_or_parametrisation_takes_every_weight(options, photos, source, tmp_path):
    model, own, before = finetune(photos, source, tmp_path / "run", **options)
    assert all(same(own[name], before[name]) for name in before)
    values = model.settings.values()
    assert all(values[name] == value for name, value in options.items())
    assert values["learn_sigma"] and values["num_channels"] == TINY["num_channels"]  # taken from the checkpoint


def test_attention_stays_on_its_levels_at_another_size(photos, source, tmp_path):
    model, *_ = finetune(photos, source, tmp_path / "run", image_size=32)
    assert model.settings.values()["attention_resolutions"] == "16"  # level 1, as 4 is at size 8


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_mean_is_kept_where_only_one_has_a_learned_variance(learn_sigma, photos, tmp_path):
    source = str(save_checkpoint(tmp_path / "a/model000001.pt", tiny_settings(learn_sigma=not learn_sigma)))
    _, own, before = finetune(photos, source, tmp_path / "run", learn_sigma=learn_sigma)
    assert len(own["out.2.weight"]) == (6 if learn_sigma else 3)
    assert same(own["out.2.weight"][:3], before["out.2.weight"][:3])


@pytest.fixture
def conditional(tmp_path):
    return str(save_checkpoint(tmp_path / "c/model000001.pt", tiny_settings(class_cond=True), class_names=CLASSES))


def test_classes_are_not_taken_unasked(conditional, photos, tmp_path, capsys):
    model, own, before = finetune(photos, conditional, tmp_path / "run")
    assert model.class_names is None and "label_emb.weight" not in own
    assert all(same(own[name], before[name]) for name in own)
    assert "--class_cond True" in capsys.readouterr().out


def test_the_embeddings_of_common_classes_are_kept_by_name(conditional, tmp_path):
    for name in ("dog", "newt", "ox"):
        write_images(tmp_path / "photos" / name, 2)
    model, own, before = finetune(
        str(tmp_path / "photos"), conditional, tmp_path / "run", class_cond=True, labels="folder"
    )
    assert model.class_names == ["dog", "newt", "ox"]
    table, old = own["label_emb.weight"], before["label_emb.weight"]
    assert same(table[0], old[CLASSES.index("dog")]) and not same(table[1], old[0])


def test_what_is_new_is_said(conditional, photos, tmp_path, capsys):
    source = str(save_checkpoint(tmp_path / "a/model000001.pt", tiny_settings(channels=1)))
    finetune(photos, source, tmp_path / "run", channels=3)
    out = capsys.readouterr().out
    assert "input_blocks.0.0.weight" in out and "out.2.weight" in out


def test_a_network_that_shares_nothing_is_refused(photos, source, tmp_path):
    with pytest.raises(UserError, match="none of its tensors"):
        load_fitting(th.nn.Linear(2, 2), checkpoint.load(source)[0], source)
    with pytest.raises(UserError, match="image model"):
        state_dict, metadata = checkpoint.load(source)
        take_network(SuperResTraining.of({}), (), source, state_dict, metadata)


def test_a_published_checkpoint_gives_its_shapes(tmp_path):
    settings = tiny_settings(image_size=32, channel_mult="1,2,2,2", attention_resolutions="8", class_cond=True,
                             num_classes=5)  # fmt: skip
    model, _ = build_model_and_diffusion(settings.model, settings.diffusion)
    taken = take_network(ImageTraining.of({}), {"num_heads"}, "x.pt", model.state_dict(), {})
    assert taken.model.image_size == 32 and taken.model.attention_resolutions == "8"
    assert not taken.model.class_cond and taken.model.num_classes == 0


# Folders


def test_a_folder_gives_its_newest_average(tmp_path, capsys):
    for name in ("model000001.pt", "ema_0.5_000001.pt", "model000002.pt", "ema_0.5_000002.pt"):
        save_checkpoint(tmp_path / "run" / name, tiny_settings())
    model = idf.load(tmp_path / "run")
    assert model.path == str(tmp_path / "run/ema_0.5_000002.pt")
    assert idf.load(tmp_path / "run", average="raw").path == str(tmp_path / "run/model000002.pt")


def test_a_folder_is_named_to_commands_and_to_new_runs(photos, tmp_path, capsys):
    save_checkpoint(tmp_path / "run/ema_0.5_000002.pt", tiny_settings())
    before, _ = checkpoint.load(str(tmp_path / "run/ema_0.5_000002.pt"))
    own = finetune(photos, str(tmp_path / "run"), tmp_path / "new")[1]
    assert all(same(own[name], before[name]) for name in before)
    assert str(tmp_path / "run/ema_0.5_000002.pt") in capsys.readouterr().out
