# SPDX-License-Identifier: Apache-2.0
"""
As :mod:`detectron2.model_zoo`, for the configs of this project.

``libra://<name>`` stands for the published weights of a config wherever Detectron2 takes a path:
in ``MODEL.WEIGHTS``, checkpointers, ``DefaultTrainer`` and ``DefaultPredictor``. Files of
mmdetection and torchvision are downloaded, checked against the hash in their name, and converted
once; the converted file is kept beside the download.
"""

import os
import re
from pathlib import Path
from typing import Optional, Union

import torch
from iopath.common.file_io import PathHandler, file_lock
from omegaconf import DictConfig
from torch import nn

from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.utils.file_io import PathManager

from .checkpoint import LibraCheckpointer
from .checkpoint.download import fetch
from .checkpoint.mmdetection import to_detectron2_checkpoint
from .config import add_libra_config, make_recipe
from .config.reading import detectron2_configs
from .errors import InputError
from .utils.atomic_write import atomic_write
from .utils.leaves import did_you_mean
from .utils.safe_reading import read_weights, reading_weights

__all__ = [
    "PREFIX",
    "find_config",
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
    "get_published_url",
]

PREFIX = "libra://"
# Increased when cached files must be converted again.
_CONVERSION = 1

_LIBRA = "https://download.openmmlab.com/mmdetection/v2.0/libra_rcnn"
# From mmdetection's model zoo; the last digits are the start of the SHA-256.
_URLS = {
    "COCO-Detection/libra_faster_rcnn_R_50_FPN_1x": f"{_LIBRA}/libra_faster_rcnn_r50_fpn_1x_coco/"
    "libra_faster_rcnn_r50_fpn_1x_coco_20200130-3afee3a9.pth",
    "COCO-Detection/libra_faster_rcnn_R_101_FPN_1x": f"{_LIBRA}/libra_faster_rcnn_r101_fpn_1x_coco/"
    "libra_faster_rcnn_r101_fpn_1x_coco_20200203-8dba6a5a.pth",
    "COCO-Detection/libra_faster_rcnn_X_101_64x4d_FPN_1x": (
        f"{_LIBRA}/libra_faster_rcnn_x101_64x4d_fpn_1x_coco/"
        "libra_faster_rcnn_x101_64x4d_fpn_1x_coco_20200315-3a7d0488.pth"
    ),
    "COCO-Detection/libra_retinanet_R_50_FPN_1x": f"{_LIBRA}/libra_retinanet_r50_fpn_1x_coco/"
    "libra_retinanet_r50_fpn_1x_coco_20200205-804d94ce.pth",
    # The weights that the published models were trained from.
    "ImageNetPretrained/torchvision/R-50": (
        "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    ),
    "ImageNetPretrained/torchvision/R-101": (
        "https://download.pytorch.org/models/resnet101-63fe2227.pth"
    ),
    "ImageNetPretrained/open-mmlab/X-101-64x4d": (
        "https://download.openmmlab.com/pretrain/third_party/resnext101_64x4d-ee2c6f71.pth"
    ),
}


def _without_suffix(config_path: str) -> str:
    return re.sub(r"\.(yaml|py)$", "", config_path)


def get_published_url(config_path: str) -> str:
    """The URL of the published file, in its original format; see :func:`get_checkpoint_url`."""
    name = _without_suffix(config_path)
    if name not in _URLS:
        raise RuntimeError(
            f"There are no published weights for {config_path!r}; there are for {', '.join(_URLS)}"
        )
    return _URLS[name]


def get_checkpoint_url(config_path: str) -> str:
    """
    Returns "libra://<name>", which Detectron2's checkpointers load.

    Args:
        config_path: name of a config, with or without suffix, or of ImageNet weights, such as
            "ImageNetPretrained/torchvision/R-50".

    Raises:
        RuntimeError: if no weights were published.
    """
    get_published_url(config_path)
    return PREFIX + _without_suffix(config_path)


# In the installed package and the checkout.
_CONFIGS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


def _find_file(name: str, *folders: Path) -> str:
    """The path of a file in the first of ``folders`` that has it, "" if none has."""
    return next((str(f / name) for f in folders if (f / name).is_file()), "")


def _unknown(name: str, zoos: str, *folders: Path) -> str:
    """The message about a name that is no config; it may suggest one of those in ``folders``."""
    suffix = ".py" if name.endswith(".py") else ".yaml"
    known = [x.relative_to(f).as_posix() for f in folders for x in f.rglob(f"*{suffix}")]
    return f"{name!r} is neither a file nor a config of {zoos}{did_you_mean(name, known)}"


def get_config_file(config_path: str) -> str:
    """
    Returns the path of a config, such as "COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml", in
    the installed package or the checkout.

    Raises:
        RuntimeError: if there is no such config.
    """
    path = _find_file(config_path, *_CONFIGS)
    if not path:
        raise RuntimeError(_unknown(config_path, "the Libra R-CNN model zoo", *_CONFIGS))
    return path


def find_config(name: str) -> str:
    """
    Returns the path of a config of this model zoo or of Detectron2's; paths and URLs unchanged.

    Raises:
        InputError: if there is no such file.
    """
    if not name or os.path.exists(name) or "://" in name:
        return name
    folders = (*_CONFIGS, Path(detectron2_configs()))
    try:
        path = _find_file(name, *folders)
    except PermissionError as e:
        raise InputError(f"{name}: {e.strerror}") from e
    if not path:
        zoos = "the Libra R-CNN model zoo, nor one of Detectron2's"
        raise InputError(_unknown(name, zoos, *folders))
    return path


def get_config(config_path: str, trained: bool = False) -> Union[CfgNode, DictConfig]:
    """
    Returns a config, a LazyConfig if the name ends in ".py".

    Args:
        config_path: see :func:`get_config_file`.
        trained: whether ``MODEL.WEIGHTS``, or ``train.init_checkpoint``, is the published weights
            instead of those that training starts from.

    Raises:
        RuntimeError: if there is no such config, or no such weights.
    """
    path = get_config_file(config_path)
    if path.endswith(".py"):
        lazy = LazyConfig.load(path)
        if trained:
            lazy.train.init_checkpoint = get_checkpoint_url(config_path)
        return lazy
    cfg = get_cfg()
    add_libra_config(cfg)
    cfg.merge_from_file(path, allow_unsafe=False)
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """
    Build a model in training mode and load its weights.

    Args:
        config_path, trained: see :func:`get_config`.
        device: such as "cuda". None for the config's, or the CPU if there is no GPU.

    Raises:
        RuntimeError: see :func:`get_config`.
        InputError: if the weights cannot be loaded; see :class:`LibraCheckpointer`.
    """
    recipe = make_recipe(get_config(config_path, trained))
    if device is not None or not torch.cuda.is_available():
        recipe.device = device or "cpu"
    if trained:
        return recipe.build_trained_model().train()
    model = recipe.build_model()
    LibraCheckpointer(model).load(recipe.weights)
    return model


class LibraZooHandler(PathHandler):
    """Resolves ``libra://<name>`` to the path of a file in Detectron2's format."""

    def _get_supported_prefixes(self):
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        try:
            url = get_published_url(path[len(PREFIX) :])
        except RuntimeError as e:
            raise FileNotFoundError(str(e)) from e
        path = fetch(url)
        target = f"{os.path.splitext(path)[0]}.detectron2-{_CONVERSION}.pth"
        with file_lock(target):  # against other processes
            if not os.path.isfile(target):
                content = read_weights(path)
                with reading_weights(path):
                    checkpoint = to_detectron2_checkpoint({"model": content})
                with atomic_write(target) as f:
                    torch.save(checkpoint, f)
        return target

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode)


PathManager.register_handler(LibraZooHandler(), allow_override=True)
