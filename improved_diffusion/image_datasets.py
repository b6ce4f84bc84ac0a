"""Images on disk to batches, under their published names; the code is in `data`."""

from .data.dataset import ImageDataset
from .data.sources import FolderImages
from .data.stream import BatchStream, load_data

__all__ = ["BatchStream", "ImageDataset", "load_data"]


def _list_image_files_recursively(data_dir):
    """The paths of the images below a folder, in the published order."""
    return FolderImages(data_dir).paths
