"""Files, images and figures: what every room needs."""
