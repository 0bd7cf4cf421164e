# SPDX-License-Identifier: Apache-2.0
from typing import Any, Dict

import numpy as np
import torch

from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor

from ..config import make_recipe
from ..errors import InputError

__all__ = ["LibraPredictor"]


class LibraPredictor(DefaultPredictor):
    """
    :class:`DefaultPredictor` that resizes with ``MODEL.LIBRA.INPUT.INTERPOLATION`` and reads
    weights in all formats of :class:`libra_d2.checkpoint.LibraCheckpointer`.
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
        self.model = recipe.build_trained_model()
        if recipe.test_datasets:
            self.metadata = MetadataCatalog.get(recipe.test_datasets[0])
        augmentations = recipe.build_augmentations(False)
        if len(augmentations) != 1:
            raise InputError(
                f"images are resized by a single augmentation, but the config has "
                f"{len(augmentations)} for evaluation"
            )
        self.aug = augmentations[0]
        self.input_format = recipe.image_format
        self._autocast = recipe.autocast

    def __call__(self, original_image: np.ndarray) -> Dict[str, Any]:
        """
        See :meth:`DefaultPredictor.__call__`, which on Detectron2's main branch reads the device
        from a YAML config; in mixed precision if ``SOLVER.AMP.ENABLED``.
        """
        image = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        height, width = image.shape[:2]
        image = self.aug.get_transform(image).apply_image(image)
        image = torch.as_tensor(image.astype("float32").transpose(2, 0, 1))
        with torch.no_grad(), self._autocast():
            return self.model([{"image": image, "height": height, "width": width}])[0]
