"""A dataset mapper whose errors name the image."""

from typing import Callable


class ImageError(Exception):
    """An image, or what is annotated in it, cannot be used; the message names its file."""

    def __str__(self) -> str:
        # A DataLoader's worker hands its whole traceback over as the message; it ends in ours.
        return super().__str__().rstrip().rpartition(f"{__name__}.{ImageError.__name__}: ")[2]


class ErrorNamingMapper:
    """Calls another mapper, such as ``DatasetMapper``, and names the file when that one fails.

    Decoders do not know what file they read, and a DataLoader's worker does not tell.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        """
        Args:
            mapper: from a dataset dict with "file_name" to what the model takes.
        """
        self._mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            ImageError: the mapper raised anything.
        """
        try:
            return self._mapper(dataset_dict)
        except Exception as error:  # what decoders raise on broken files can be anything
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise ImageError(
                f"{dataset_dict['file_name']} cannot be used ({problem}); mend it, or take it out "
                "of the annotations. tools/check_dataset.py finds all such images at once"
            ) from error
