# SPDX-License-Identifier: Apache-2.0
from detectron2.config import CfgNode as CN

__all__ = ["add_libra_config"]


def add_libra_config(cfg: CN) -> None:
    """
    Add the config keys of Libra R-CNN (arXiv 1904.02701), all under ``MODEL.LIBRA``.

    They take effect with ``MODEL.BACKBONE.NAME: build_libra_resnet_fpn_backbone``,
    ``MODEL.ROI_HEADS.NAME: LibraROIHeads`` and ``MODEL.PROPOSAL_GENERATOR.NAME: LibraRPN``, or with
    ``MODEL.META_ARCHITECTURE: LibraRetinaNet`` and ``build_libra_retinanet_resnet_fpn_backbone``.
    Section, equation and figure numbers are those of the CVPR 2019 paper.
    """
    cfg.MODEL.LIBRA = CN()

    # Input images (not in the paper)
    cfg.MODEL.LIBRA.INPUT = CN()
    # What resizes images in training, evaluation, test-time augmentation, demo and export; both are
    # bilinear. "pillow": as in Detectron2. "opencv": as in mmdetection, without the smoothing of
    # images that shrink, and with mmdetection's rounding of the new size. A model should see images
    # as it was trained with them; the configs of published models set "opencv".
    cfg.MODEL.LIBRA.INPUT.INTERPOLATION = "pillow"

    # Balanced feature pyramid (Section 3.2)
    cfg.MODEL.LIBRA.BFP = CN()
    # False gives the plain pyramid.
    cfg.MODEL.LIBRA.BFP.ENABLED = True
    # Registered backbone that "build_libra_backbone" builds and adds the balanced pyramid to: any
    # that returns a pyramid with equal channels, a user's own included. The other backbones of
    # libra_d2 have their base in their name.
    cfg.MODEL.LIBRA.BFP.BASE_BACKBONE = "build_resnet_fpn_backbone"
    # Index, from high to low resolution, of the level at which the features are averaged and
    # refined: 0 to number of levels - 1. P4 is 2 in a pyramid P2..P6 (R-CNN) and 1 in P3..P7
    # (RetinaNet).
    cfg.MODEL.LIBRA.BFP.REFINE_LEVEL = 2
    # Refinement of the averaged features: "non_local" (embedded Gaussian attention), "conv"
    # (3x3 convolution), "none", or another registered one (REFINEMENT_REGISTRY).
    cfg.MODEL.LIBRA.BFP.REFINE_TYPE = "non_local"

    # Sampling of proposals for the second stage (Section 3.1)
    cfg.MODEL.LIBRA.SAMPLER = CN()
    # A registered sampler (PROPOSAL_SAMPLER_REGISTRY), a user's own included. The keys below are
    # those of "BalancedSampler".
    cfg.MODEL.LIBRA.SAMPLER.NAME = "BalancedSampler"
    # "iou_balanced" (equally many from each IoU bin, Equation 2) or "random".
    cfg.MODEL.LIBRA.SAMPLER.NEGATIVES = "iou_balanced"
    # "instance_balanced" (equally many for each ground-truth instance) or "random".
    cfg.MODEL.LIBRA.SAMPLER.POSITIVES = "instance_balanced"
    # Number of IoU bins (K in Equation 2), 1 or more.
    cfg.MODEL.LIBRA.SAMPLER.NUM_BINS = 3
    # "paper": the bins span the IoUs of negatives, [0, IOU_THRESHOLDS[0]).
    # "reference": as in mmdetection, the bins span [0, 1) when ground truth is added to the
    # proposals, so that the last one is empty, and negatives without overlap are drawn last.
    # The configs of published models use it; see libra_d2.modeling.BalancedSampler.
    cfg.MODEL.LIBRA.SAMPLER.MODE = "paper"

    # Balanced L1 loss (Section 3.3), used where BBOX_REG_LOSS_TYPE is "balanced_l1"
    cfg.MODEL.LIBRA.BALANCED_L1 = CN()
    # Greater than 0. A smaller value raises the gradient of inliers (Figure 5).
    cfg.MODEL.LIBRA.BALANCED_L1.ALPHA = 0.5
    # Greater than 0. Upper bound of the gradient, that of outliers.
    cfg.MODEL.LIBRA.BALANCED_L1.GAMMA = 1.5
    # Error, in units of box deltas, from which on the loss is linear. Greater than 0.
    cfg.MODEL.LIBRA.BALANCED_L1.BETA = 1.0
    # How the loss depends on BETA; the same for 1. "scaled": the paper's shape at any BETA.
    # "reference": mmdetection's formula, whose gradient jumps at 0 and at BETA.
    cfg.MODEL.LIBRA.BALANCED_L1.FORM = "scaled"

    # Training of the region proposal network (not in the paper; mmdetection's recipe)
    cfg.MODEL.LIBRA.RPN = CN()
    # Sampled negative anchors per sampled positive one, at most, in each image (no positive counts
    # as one). Negative for no limit.
    cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS = 5
    # What the losses are divided by: "sampled" (number of anchors really sampled) or "batch_size"
    # (RPN.BATCH_SIZE_PER_IMAGE times the number of images, as in Detectron2).
    cfg.MODEL.LIBRA.RPN.NORMALIZER = "sampled"

    # Lowest IoU at which an anchor that a ground-truth box overlaps most is matched with that box,
    # the last one if there are several, in [0, 1]. Negative, such as -1.0, for Detectron2's rule:
    # at any IoU, and the anchor is matched with the box that it overlaps most.
    cfg.MODEL.LIBRA.RPN.LOW_QUALITY_IOU = 0.3
    # Whether anchors beyond an image, where it is padded because its batch has a larger one, are
    # trained on as background, as in Detectron2.
    cfg.MODEL.LIBRA.RPN.PADDING_ANCHORS = False

    # RetinaNet as mmdetection has it (not in the paper)
    cfg.MODEL.LIBRA.RETINANET = CN()
    # What the losses are divided by: "batch" (foreground anchors in the batch, at least one for
    # each image) or "moving_average" (Detectron2's).
    cfg.MODEL.LIBRA.RETINANET.NORMALIZER = "batch"
    # As RPN.LOW_QUALITY_IOU.
    cfg.MODEL.LIBRA.RETINANET.LOW_QUALITY_IOU = 0.0
    # As RPN.PADDING_ANCHORS.
    cfg.MODEL.LIBRA.RETINANET.PADDING_ANCHORS = False
    # Whether there is a ReLU between P6 and P7, as in Detectron2. Weights of plain Detectron2
    # models need True, those of mmdetection False.
    cfg.MODEL.LIBRA.RETINANET.P7_RELU = False
    # Whether boxes are clipped to the image, and those without area dropped, before non-maximum
    # suppression. False, as in Detectron2, does so after it.
    cfg.MODEL.LIBRA.RETINANET.CLIP_BOXES = True

    # Whether to train scale and shift of the batch norms in the backbone's trained stages while
    # their running statistics stay fixed, as mmdetection does (not in the paper). It needs
    # RESNETS.NORM "FrozenBN", which without it trains nothing.
    cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE = False

    # Training
    cfg.MODEL.LIBRA.TRAINER = CN()
    # Gradient accumulation: number of micro-batches that each batch of SOLVER.IMS_PER_BATCH images
    # is split into, to need less memory. 1 or more; it must divide the images of each process.
    # Gradients are those of the whole batch; iterations count batches.
    cfg.MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS = 1
    # Length of the training in passes over the training images, such as 12. SOLVER.MAX_ITER follows
    # from their number and the batch size, SOLVER.STEPS stay in proportion to it, and without
    # TEST.EVAL_PERIOD each epoch ends with an evaluation and a checkpoint. 0 for SOLVER.MAX_ITER,
    # which also counts where the command line names it alone.
    cfg.MODEL.LIBRA.TRAINER.EPOCHS = 0.0
    # Decay of an exponential moving average of the weights, in (0, 1), such as 0.9998. It is
    # evaluated as "<task>_EMA" and written to model_final_ema.pth. 0 for none.
    cfg.MODEL.LIBRA.TRAINER.EMA_DECAY = 0.0
    # Metric whose best model is kept as model_best.pth: one that evaluations report, such as
    # "bbox/AP", "bbox_EMA/AP" of averaged weights, "<dataset>/bbox/AP" if there are several
    # datasets. "" for none.
    cfg.MODEL.LIBRA.TRAINER.BEST_METRIC = ""
    # Number of evaluations without a new maximum of BEST_METRIC ("bbox/AP" if that is not set)
    # after which the training ends. 0 for none.
    cfg.MODEL.LIBRA.TRAINER.PATIENCE = 0
    # Whether each evaluation also computes the losses of the validation images, as "validation/*".
    cfg.MODEL.LIBRA.TRAINER.VALIDATION_LOSS = False
    # How many of the checkpoints that are written each SOLVER.CHECKPOINT_PERIOD are kept, the last
    # ones. 0 for all. model_final.pth does not count.
    cfg.MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS = 0

    # Speed: the same numbers, but for rounding, in less time (docs/benchmark.md)
    cfg.MODEL.LIBRA.SPEED = CN()
    # When features have their channels last in memory: "always", "inference", "never", or "auto":
    # where it was measured to be faster, in inference on CPUs, in training on those with AVX-512,
    # and where it is known to be, on GPUs in mixed precision; not on Windows.
    cfg.MODEL.LIBRA.SPEED.CHANNELS_LAST = "auto"
    # Whether batch norms with fixed statistics are folded into the convolutions in front of them,
    # in training, too. Checkpoints do not change.
    cfg.MODEL.LIBRA.SPEED.FOLD_NORM = True
    # Whether RoIAlign runs on all cores of a CPU rather than on one.
    cfg.MODEL.LIBRA.SPEED.PARALLEL_ROI_ALIGN = True
    # What SOLVER.AMP computes in, in training and evaluation: "float16" (GPUs only), "bfloat16",
    # which needs no scaling of the loss, or "auto": float16 on GPUs, as in Detectron2, else
    # bfloat16.
    cfg.MODEL.LIBRA.SPEED.AMP_DTYPE = "auto"
    # Whether the backbone is compiled by torch.compile, which takes minutes once.
    cfg.MODEL.LIBRA.SPEED.COMPILE_BACKBONE = False

    # Number of images whose detections are drawn next to their ground truth at each evaluation,
    # into OUTPUT_DIR/pictures. 0 for none.
    cfg.MODEL.LIBRA.NUM_PICTURES = 0
