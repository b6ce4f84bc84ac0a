"""Files, downloads, images and figures."""
