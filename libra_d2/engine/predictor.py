# SPDX-License-Identifier: Apache-2.0
from typing import Any, Dict, Iterable, List, Union

import numpy as np
import torch
from PIL import Image

from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.engine import DefaultPredictor

from ..config import make_recipe
from ..errors import ArgumentError, InputError

__all__ = ["LibraPredictor"]


class LibraPredictor(DefaultPredictor):
    """
    :class:`DefaultPredictor` that resizes with ``MODEL.LIBRA.INPUT.INTERPOLATION``, reads weights
    in all formats of :class:`libra_d2.checkpoint.LibraCheckpointer`, and takes several images, too.

    ``metadata.thing_classes`` are the names of the classes that the weights were trained on, if the
    checkpoint has them, else those of the config's dataset.
    """

    def __init__(self, cfg: Any):
        """
        This replaces the parent's constructor, which loads weights and resizes in its own way.

        Args:
            cfg: a ``CfgNode`` with the keys of :func:`libra_d2.add_libra_config`, a LazyConfig, or
                the recipe of one.

        Raises:
            InputError: see :meth:`libra_d2.config.Recipe.build_trained_model`; also if the config
                has several augmentations for evaluation.
        """
        recipe = make_recipe(cfg).copy()
        self.cfg = recipe.config
        self.model, learned = recipe.load_trained_model()
        datasets = recipe.test_datasets
        self.metadata = MetadataCatalog.get(datasets[0]) if datasets else Metadata()
        if learned and list(self.metadata.get("thing_classes") or ()) != learned:
            self.metadata = Metadata(thing_classes=learned)
        augmentations = recipe.build_augmentations(False)
        if len(augmentations) != 1:
            raise InputError(
                f"images are resized by a single augmentation, but the config has "
                f"{len(augmentations)} for evaluation"
            )
        self.aug = augmentations[0]
        self.input_format = recipe.image_format
        # Pillow converts to the other formats.
        self._is_converted = self.input_format not in ("BGR", "RGB")
        mean = getattr(self.model, "pixel_mean", None)
        # Depth may be a fourth channel; a single mean is of grayscale, or of all channels.
        has_means = isinstance(mean, torch.Tensor) and mean.numel() > 1
        self._num_channels = mean.numel() if has_means else 3
        self._autocast = recipe.autocast

    def __call__(
        self, original_image: Union[np.ndarray, Iterable[np.ndarray]]
    ) -> Union[Dict[str, Any], List[Dict[str, Any]]]:
        """
        Detect objects, in mixed precision if ``SOLVER.AMP.ENABLED``. This replaces the parent's
        method, which on Detectron2's main branch reads the device from a YAML config.

        Args:
            original_image: (H, W, 3) uint8 BGR, or a list of such images of any sizes, which are
                a batch. Models with BGR or RGB input take other numbers, too, and as many channels
                as ``MODEL.PIXEL_MEAN`` has.

        Returns:
            the output of the model for the image, or a list with that of each image.

        Raises:
            ArgumentError: if an image has another shape or type.
        """
        if isinstance(original_image, np.ndarray) or not isinstance(original_image, Iterable):
            return self([original_image])[0]
        with torch.no_grad(), self._autocast():
            inputs = [self._input(image) for image in original_image]
            return self.model(inputs) if inputs else []

    def _check(self, image: Any) -> None:
        """Raise ArgumentError unless the image is what :meth:`__call__` takes."""
        is_array, number = isinstance(image, np.ndarray), self._num_channels
        has_shape = is_array and image.ndim == 3 and image.shape[2] == number and image.size > 0
        is_number = is_array and image.dtype.kind in "uif" and not self._is_converted
        if has_shape and (is_number or image.dtype == np.uint8):
            return
        found = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
        rule = f"use an array of shape (height, width, {number}), BGR, usually of type uint8"
        more = "or a list of them; libra_d2.data.read_image reads files"
        raise ArgumentError("image", found, f"{rule}, {more}")

    def _input(self, original_image: np.ndarray) -> Dict[str, Any]:
        """The input of the model for an image."""
        self._check(original_image)
        image = original_image
        if self.input_format != "BGR":
            image = image[:, :, [2, 1, 0, *range(3, self._num_channels)]]
        if image.dtype != np.uint8 or self._num_channels != 3:
            # Pillow knows few types, and multiplies colors by a fourth channel.
            image = image.astype(np.float32)
        if self._is_converted:
            image = convert_PIL_to_numpy(Image.fromarray(image), self.input_format)
        height, width = image.shape[:2]
        image = self.aug.get_transform(image).apply_image(image)
        image = torch.as_tensor(image.astype("float32").transpose(2, 0, 1))
        return {"image": image, "height": height, "width": width}
