"""Images on disk to batches, under their published names; the code is in `data`."""

from .data.dataset import ImageDataset
from .data.stream import BatchStream, load_data

__all__ = ["BatchStream", "ImageDataset", "load_data"]
