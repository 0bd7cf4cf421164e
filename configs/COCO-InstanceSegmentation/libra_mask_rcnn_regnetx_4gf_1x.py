# Libra Mask R-CNN with RegNetX-4GF: Detectron2's config, with its training recipe and initial
# weights, and the ideas of Libra R-CNN. It has not been trained on COCO.
from detectron2 import model_zoo

from libra_d2.lazy import balance

_name = "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py"
_config = model_zoo.get_config(_name)
dataloader, lr_multiplier, optimizer = _config.dataloader, _config.lr_multiplier, _config.optimizer
model, train = _config.model, _config.train
balance(model)
