"""`BatchCaptioner`: captions a column of images, for `datasets.map(batched=True)` and Ray Data's `map_batches`."""

import copy
import inspect
import os
from collections.abc import MutableMapping
from typing import Any

from .captioner import Captioner
from .images import ImageError

ERROR_COLUMN = "error"
LOADING = {name for name in inspect.signature(Captioner.from_pretrained).parameters if name != "name_or_path"}


class BatchCaptioner:
    """Captions the images in one column of a batch.

    ```python
    dataset = dataset.map(BatchCaptioner(), batched=True, batch_size=32)
    rows = ray_dataset.map_batches(BatchCaptioner, batch_size=32, concurrency=2, fn_constructor_kwargs={"image_column": "photo"})
    ```

    The model is loaded at the first call. A pickled object has no model: each process loads its own.

    Args:
        model: a folder or a Hub repository. Default: the checkpoint in this package.
        image_column: the column of images: of any kind that `Captioner.caption` takes, or dictionaries with "bytes" or "path", as
            `datasets.Image(decode=False)` gives.
        output_column: the new column of captions.
        options: arguments of `Captioner.from_pretrained` and `Captioner.caption`, such as `device` and `num_beams`. `batch_size`
            is that of the forward pass, 8 by default.

    Raises:
        ValueError: `output_column` is `image_column` or "error".
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        image_column: str = "image",
        output_column: str = "caption",
        **options: Any,
    ):
        if output_column in (image_column, ERROR_COLUMN):
            raise ValueError(f"`output_column` is '{output_column}', which is another column of the output: give another name.")
        self.model, self.image_column, self.output_column = model, image_column, output_column
        self.options = options
        self._captioner: Captioner | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_captioner": None}

    def __call__(self, batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Captions a batch of N rows.

        Args:
            batch: columns by name, each a list or array of N values. It is not changed.

        Returns:
            A copy with two more columns of N strings: the captions, and `error`: "" or why an image cannot be read or captioned.
            The caption of such an image is "".

        Raises:
            ValueError: there is no column of images, or the library that made the batch cannot decode one of its images; also as
                for `Captioner.caption`.
        """
        if self.image_column not in batch:
            raise ValueError(f"There is no column '{self.image_column}', but {', '.join(batch)}: give its name as `image_column`.")
        result = copy.copy(batch)  # before the images of a lazy batch are decoded: it would then store them anew
        try:
            images = list(batch[self.image_column])
        except Exception as error:  # of Pillow, for a damaged image
            raise ValueError(
                f"The column '{self.image_column}' cannot be decoded ({error}): turn decoding off with "
                f"`dataset.cast_column('{self.image_column}', datasets.Image(decode=False))`, so that only the broken row fails."
            ) from error
        loading = {name: value for name, value in self.options.items() if name in LOADING}
        captioning = {name: value for name, value in self.options.items() if name not in LOADING}
        if self._captioner is None:
            self._captioner = Captioner.from_pretrained(self.model, **loading)
        outcomes = list(self._captioner.stream(map(_source, images), on_error="yield", attention=False, **captioning))
        result[self.output_column] = ["" if isinstance(one, ImageError) else one.text for one in outcomes]
        result[ERROR_COLUMN] = [str(one) if isinstance(one, ImageError) else "" for one in outcomes]
        return result


def _source(value: Any) -> Any:
    """What `Captioner` takes, from a value of a column."""
    if isinstance(value, dict) and not set(value) - {"bytes", "path"}:
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value
