#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Train and evaluate Libra R-CNN, with the arguments of Detectron2's own ``tools/train_net.py``:

    ./train_net.py --config-file configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml
    ./train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth
    ./train_net.py --config-file ... --train-json a.json --train-images a/ \
        --val-json b.json --val-images b/

It is the program that an installed libra_d2 has as ``libra-d2-train``. To change the training,
subclass :class:`libra_d2.engine.Trainer` as you would :class:`detectron2.engine.DefaultTrainer`.
"""

from libra_d2.engine import launch
from libra_d2.engine.main import build_argument_parser, run

if __name__ == "__main__":
    launch(run, build_argument_parser().parse_args())
