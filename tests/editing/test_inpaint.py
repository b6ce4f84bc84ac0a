"""Painting the masked part: known pixels stay, painted ones are like the data."""

import numpy as np
import pytest
from editing_helpers import gaussian_images, gaussian_model
from gaussian_world import MU, GaussianWorld, S

from improved_diffusion.config import UserError
from improved_diffusion.config.settings import Inpainting
from improved_diffusion.editing.inpaint import Inpaint, _path
from improved_diffusion.editing.masks import GREY


def test_painting_leaves_the_known_pixels_alone_and_makes_the_others_like_the_data():
    world, pictures = GaussianWorld(100, 20), gaussian_images(200)
    model = gaussian_model(world, "ancestral", _path, Inpainting, jump_length=4, resamplings=2)
    masks = np.random.default_rng(0).random((200, 16, 16)) < 0.5
    painted = Inpaint(model, pictures, masks).draw(list(range(200)))
    np.testing.assert_array_equal(painted[~masks], pictures[~masks])
    assert (painted[masks] != pictures[masks]).mean() > 0.9
    x = painted[masks] / 127.5 - 1 + 0.5 / 127.5  # 8 bits are cut off, not rounded
    n = x.size
    assert x.mean() == pytest.approx(MU, abs=5 * S / np.sqrt(n))
    assert x.var() == pytest.approx(S**2 - world.reverse_variance[0], rel=5 * np.sqrt(2 / n))


def test_one_mask_serves_all_images_and_each_image_may_have_its_own():
    model, pictures = gaussian_model(GaussianWorld(100, 2), "ddim", _path, Inpainting), gaussian_images(2)
    masks = np.zeros((2, 16, 16), bool)
    masks[0, :8] = masks[1, 8:] = True
    of_all, of_each = Inpaint(model, pictures, masks[:1]), Inpaint(model, pictures, masks)
    np.testing.assert_array_equal(of_all.masks_of([0, 1, 2]), masks[[0, 0, 0]])
    np.testing.assert_array_equal(of_each.masks_of([0, 1, 2]), masks[[0, 1, 0]])
    assert (of_each.shown_beside(3)[8:] == GREY).all()
    np.testing.assert_array_equal(of_each.shown_beside(3)[:8], pictures[1][:8])


@pytest.mark.parametrize("shape, dtype", [((3, 16, 16), bool), ((1, 16, 8), bool), ((16, 16), bool),
                                          ((1, 16, 16), np.uint8)])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(shape, dtype):
    model = gaussian_model(GaussianWorld(100, 2), "ddim", _path, Inpainting)
    with pytest.raises(UserError, match=r"the masks are .* bool \[1, 16, 16\] or \[2, 16, 16\]"):
        Inpaint(model, gaussian_images(2), np.ones(shape, dtype))
