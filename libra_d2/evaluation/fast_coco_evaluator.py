# SPDX-License-Identifier: Apache-2.0
import importlib.util
import logging

from pycocotools.cocoeval import COCOeval

from detectron2.evaluation import COCOEvaluator, coco_evaluation

__all__ = ["FastCOCOEvaluator", "build_coco_evaluator"]

logger = logging.getLogger(__name__)


def _has_compiled_evaluator() -> bool:
    """Whether this Detectron2 was built with its own fast evaluator."""
    return coco_evaluation.COCOeval_opt is not COCOeval


def _faster_coco_eval(coco_gt, coco_dt, iou_type: str):
    """faster-coco-eval's evaluator, over the data of pycocotools' objects."""
    from faster_coco_eval import COCO, COCOeval_faster

    def convert(coco):
        converted = COCO()
        converted.dataset = coco.dataset
        converted.createIndex()
        return converted

    return COCOeval_faster(convert(coco_gt), convert(coco_dt), iou_type, print_function=logger.info)


class FastCOCOEvaluator(COCOEvaluator):
    """
    :class:`COCOEvaluator` that counts with the package faster-coco-eval where it would with
    Detectron2's compiled evaluator, if that were there. The numbers are pycocotools'.
    """

    def _eval_predictions(self, *args, **kwargs) -> None:
        # Detectron2 looks its evaluator up under this name; it is not an argument anywhere.
        evaluator = coco_evaluation.COCOeval_opt
        coco_evaluation.COCOeval_opt = _faster_coco_eval
        try:
            super()._eval_predictions(*args, **kwargs)
        finally:
            coco_evaluation.COCOeval_opt = evaluator


def build_coco_evaluator(dataset_name: str, output_dir: str) -> COCOEvaluator:
    """
    Choose the fastest evaluator there is: Detectron2's compiled one, faster-coco-eval, pycocotools.

    Args:
        dataset_name, output_dir: see :class:`COCOEvaluator`.
    """
    if _has_compiled_evaluator():
        return COCOEvaluator(dataset_name, output_dir=output_dir)
    if importlib.util.find_spec("faster_coco_eval") is not None:
        return FastCOCOEvaluator(dataset_name, output_dir=output_dir)
    logger.info(
        "Evaluating with pycocotools; `pip install faster-coco-eval` gives the same numbers faster."
    )
    return COCOEvaluator(dataset_name, output_dir=output_dir)
