# Libra R-CNN without an RPN. dataloader.*.dataset.proposal_files name the files with its proposals,
# which are written by tools/dump_proposals.py or mmdetection.
from ..common.libra_faster_rcnn_fpn import dataloader, lr_multiplier, model, optimizer, train

model.proposal_generator = None
dataloader.train.mapper.precomputed_proposal_topk = 2000
dataloader.test.mapper.precomputed_proposal_topk = 1000000  # all proposals in the file
