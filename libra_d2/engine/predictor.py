# SPDX-License-Identifier: Apache-2.0
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor

from ..checkpoint import build_trained_model
from ..data import build_augmentation
from ..errors import InputError

__all__ = ["LibraPredictor"]


class LibraPredictor(DefaultPredictor):
    """
    :class:`DefaultPredictor` that resizes as ``MODEL.LIBRA.INPUT.INTERPOLATION`` says, and takes
    weights in any format that :class:`libra_d2.checkpoint.LibraCheckpointer` reads.
    """

    def __init__(self, cfg: CfgNode):
        """
        The parent's constructor loads weights and resizes in its own way, so that its attributes
        are set here.

        Args:
            cfg: a config with the keys of :func:`libra_d2.add_libra_config`.

        Raises:
            InputError: if config and weights cannot be used; see :func:`build_trained_model`.
        """
        self.cfg = cfg.clone()
        self.model = build_trained_model(self.cfg)
        if cfg.DATASETS.TEST:
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        augmentations = build_augmentation(cfg, is_train=False)
        if len(augmentations) != 1:
            raise InputError(
                f"images are resized by a single augmentation, but the config has "
                f"{len(augmentations)} for evaluation"
            )
        self.aug = augmentations[0]
        self.input_format = cfg.INPUT.FORMAT
