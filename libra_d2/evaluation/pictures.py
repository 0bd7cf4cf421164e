# SPDX-License-Identifier: Apache-2.0
import os
from contextlib import suppress
from typing import Dict, List

import numpy as np
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import get_event_storage

from ..data import read_image
from ..utils.display import display_metadata

__all__ = ["PredictionPictures", "picture_scale"]

MAX_SIDE = 4000  # pixels


def picture_scale(image: np.ndarray, min_width: int) -> float:
    """
    The scale, at least 1, at which an (H, W, C) image is ``min_width`` pixels wide or more, so that
    labels can be read; no side is enlarged beyond :data:`MAX_SIDE`.
    """
    height, width = image.shape[:2]
    return max(1.0, min(min_width / width, MAX_SIDE / max(height, width)))


class PredictionPictures(DatasetEvaluator):
    """
    Draws the first images of a dataset: detections on the left, ground truth on the right, as their
    captions say. During training they are logged to TensorBoard as well. It adds nothing to the
    results. Detectron2's visualizer needs OpenCV (``pip install opencv-python-headless``).
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str,
        *,
        num_images: int,
        score_thresh: float = 0.5,
        min_size: int = 400,
    ):
        """
        Args:
            dataset_name: a registered dataset.
            output_dir: directory for the pictures, created when needed.
            num_images: how many images to draw (in each process).
            score_thresh: detections with a lower score are not drawn, in [0, 1].
            min_size: smaller images are enlarged to this width in pixels.
        """
        self.output_dir = output_dir
        self.num_images = num_images
        self.score_thresh = score_thresh
        self.min_size = min_size
        metadata = MetadataCatalog.get(dataset_name)
        self.metadata, self.image_root = display_metadata(metadata), metadata.get("image_root")
        self.ground_truth = {d["image_id"]: d for d in DatasetCatalog.get(dataset_name)}
        self.num_drawn = 0

    def reset(self) -> None:
        self.num_drawn = 0

    def _name_of(self, image: str) -> str:
        """Of a picture: the path of its image in the folder of the dataset, if it is in it."""
        folder, name = os.path.split(os.path.abspath(image))
        root = os.path.join(os.path.abspath(self.image_root or folder), "")
        if folder.startswith(root) and root != os.sep:
            name = os.path.join(folder[len(root) :], name)
        return os.path.splitext(name)[0].replace(os.sep, "-")

    def process(self, inputs: List[Dict], outputs: List[Dict]) -> None:
        """See :meth:`DatasetEvaluator.process`. Outputs without detections are not drawn."""
        from detectron2.utils.visualizer import ColorMode  # it imports OpenCV

        from .panel import Panel, join_panels

        for input, output in zip(inputs, outputs):
            if self.num_drawn == self.num_images or "instances" not in output:
                return
            instances = output["instances"].to("cpu")
            image = read_image(input["file_name"], format="RGB")
            scale = picture_scale(image, self.min_size)
            arguments = (image, self.metadata, scale, ColorMode.SEGMENTATION)  # colors of classes
            predictions = Panel(*arguments).draw_instance_predictions(
                instances[instances.scores >= self.score_thresh]
            )
            truth = Panel(*arguments).draw_dataset_dict(self.ground_truth[input["image_id"]])
            name = self._name_of(input["file_name"])
            picture = join_panels(
                [predictions.get_image(), truth.get_image()], ["detections", "ground truth"]
            )
            os.makedirs(self.output_dir, exist_ok=True)
            Image.fromarray(picture).save(os.path.join(self.output_dir, f"{name}.jpg"), quality=92)
            with suppress(AssertionError):  # there is no storage outside of training
                get_event_storage().put_image(f"validation/{name}", picture.transpose(2, 0, 1))
            self.num_drawn += 1
