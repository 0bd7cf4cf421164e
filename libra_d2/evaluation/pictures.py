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
    Args:
        image: (H, W, C).
        min_width: pixels that it should be wide at least, so that labels can be read.

    Returns:
        by what to enlarge it, at least 1; no side grows beyond :data:`MAX_SIDE`.
    """
    height, width = image.shape[:2]
    return max(1.0, min(min_width / width, MAX_SIDE / max(height, width)))


class PredictionPictures(DatasetEvaluator):
    """
    Save pictures of the first images of a dataset while it is evaluated: detections on the left,
    ground truth on the right. While training they are shown in TensorBoard as well. It adds nothing
    to the results. Detectron2's visualizer needs OpenCV (``pip install opencv-python-headless``).
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
            output_dir: directory for the pictures, made when needed.
            num_images: how many images to draw (in each process).
            score_thresh: detections with a lower score are not drawn, in [0, 1].
            min_size: smaller images are enlarged to this width, in pixels, so that the labels
                can be read.
        """
        self.output_dir = output_dir
        self.num_images = num_images
        self.score_thresh = score_thresh
        self.min_size = min_size
        self.metadata = display_metadata(MetadataCatalog.get(dataset_name))
        self.ground_truth = {d["image_id"]: d for d in DatasetCatalog.get(dataset_name)}
        self.num_drawn = 0

    def reset(self) -> None:
        """Start over with the first image."""
        self.num_drawn = 0

    def process(self, inputs: List[Dict], outputs: List[Dict]) -> None:
        """
        Args: see :meth:`DatasetEvaluator.process`. Nothing is drawn for outputs without detections,
        such as those of a proposal network.
        """
        # It imports OpenCV, which nothing else here needs.
        from detectron2.utils.visualizer import ColorMode, Visualizer

        for input, output in zip(inputs, outputs):
            if self.num_drawn == self.num_images or "instances" not in output:
                return
            instances = output["instances"].to("cpu")
            image = read_image(input["file_name"], format="RGB")
            scale = picture_scale(image, self.min_size)
            arguments = (image, self.metadata, scale, ColorMode.SEGMENTATION)  # colors of classes
            predictions = Visualizer(*arguments).draw_instance_predictions(
                instances[instances.scores >= self.score_thresh]
            )
            truth = Visualizer(*arguments).draw_dataset_dict(self.ground_truth[input["image_id"]])
            name = os.path.splitext(os.path.basename(input["file_name"]))[0]
            picture = np.hstack([predictions.get_image(), truth.get_image()])
            os.makedirs(self.output_dir, exist_ok=True)
            Image.fromarray(picture).save(os.path.join(self.output_dir, f"{name}.jpg"), quality=92)
            with suppress(AssertionError):  # there is no storage but in training
                get_event_storage().put_image(f"validation/{name}", picture.transpose(2, 0, 1))
            self.num_drawn += 1
