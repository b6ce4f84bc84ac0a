"""One engine with two small models, for all tests that need a real one."""

import pytest
from model_helpers import CLASSES, save_checkpoint, tiny_settings

import improved_diffusion as idf
from improved_diffusion.config.service import EngineConfig
from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.service.catalogue import Catalogue
from improved_diffusion.service.engine import Engine


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pets = tiny_settings(class_cond=True, label_drop=0.1)
    large = tiny_settings(SuperResModel, image_size=None, large_size=16, small_size=8)
    return {
        "pets": save_checkpoint(folder / "pets.pt", pets, class_names=CLASSES),
        "large": save_checkpoint(folder / "large.pt", large),
    }


@pytest.fixture(scope="session")
def engine(model_paths):
    paths = [str(path) for path in model_paths.values()]
    with Engine(Catalogue(model_paths=paths), EngineConfig(max_queue=100)) as found:
        yield found


@pytest.fixture(scope="session")
def models(model_paths):
    """The same models in Python."""
    return {name: idf.load(path) for name, path in model_paths.items()}
