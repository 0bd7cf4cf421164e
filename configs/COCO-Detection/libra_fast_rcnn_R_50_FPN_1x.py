# Libra R-CNN without RPN. dataloader.*.dataset.proposal_files name the proposals: files of
# tools/dump_proposals.py, or of mmdetection.
from ..common.libra_faster_rcnn_fpn import dataloader, lr_multiplier, model, optimizer, train

model.proposal_generator = None
dataloader.train.mapper.precomputed_proposal_topk = 2000
dataloader.test.mapper.precomputed_proposal_topk = 1000000  # all that the file has
