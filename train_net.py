#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Train and evaluate Libra R-CNN. The arguments are those of Detectron2's ``tools/train_net.py``, plus
options for your own data:

    ./train_net.py --config-file configs/COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml
    ./train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth
    ./train_net.py --config-file ... --train-json a.json --train-images a/ \
        --val-json b.json --val-images b/

Installing libra_d2 also installs this program as ``libra-d2-train``. To change the training,
subclass :class:`libra_d2.engine.Trainer` as you would subclass
:class:`detectron2.engine.DefaultTrainer`.
"""

from libra_d2.engine.main import main

if __name__ == "__main__":
    main()
