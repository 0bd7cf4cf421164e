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
    # How images are resized in training, evaluation, test-time augmentation, demo and export. Both
    # options are bilinear.
    # "pillow": as in Detectron2.
    # "opencv": as in mmdetection. Images that shrink are not smoothed, and the new size is rounded
    #     differently.
    # A model should be used with the option that it was trained with. Configs of published models
    # use "opencv".
    cfg.MODEL.LIBRA.INPUT.INTERPOLATION = "pillow"
    # Number of images of each dataset given by --train-json or --val-json that are opened and
    # checked before the training, spread over the dataset; 0 for none, -1 for all. Images that were
    # checked before, and have not changed, are not opened again.
    cfg.MODEL.LIBRA.INPUT.CHECK_IMAGES = -1

    # Balanced feature pyramid (Section 3.2)
    cfg.MODEL.LIBRA.BFP = CN()
    # False gives the plain feature pyramid.
    cfg.MODEL.LIBRA.BFP.ENABLED = True
    # Name of the registered backbone that "build_libra_backbone" adds the balanced pyramid to. It
    # can be any backbone that returns a pyramid whose levels have the same number of channels,
    # including your own. Other backbones of libra_d2 do not use this key.
    cfg.MODEL.LIBRA.BFP.BASE_BACKBONE = "build_resnet_fpn_backbone"
    # Index of the level at which features are averaged and refined. 0 is the level with the highest
    # resolution. P4 has index 2 in P2 to P6 (R-CNN) and 1 in P3 to P7 (RetinaNet).
    cfg.MODEL.LIBRA.BFP.REFINE_LEVEL = 2
    # How the averaged features are refined: "non_local" (embedded Gaussian attention), "conv" (3x3
    # convolution), "none", or the name of your own module in REFINEMENT_REGISTRY.
    cfg.MODEL.LIBRA.BFP.REFINE_TYPE = "non_local"

    # Sampling of proposals for the second stage (Section 3.1)
    cfg.MODEL.LIBRA.SAMPLER = CN()
    # Name of a sampler in PROPOSAL_SAMPLER_REGISTRY, which can be your own. The other keys of this
    # section belong to "BalancedSampler".
    cfg.MODEL.LIBRA.SAMPLER.NAME = "BalancedSampler"
    # "iou_balanced" (the same number from each IoU bin, Equation 2) or "random".
    cfg.MODEL.LIBRA.SAMPLER.NEGATIVES = "iou_balanced"
    # "instance_balanced" (the same number for each ground-truth instance) or "random".
    cfg.MODEL.LIBRA.SAMPLER.POSITIVES = "instance_balanced"
    # Number of IoU bins (K in Equation 2), at least 1.
    cfg.MODEL.LIBRA.SAMPLER.NUM_BINS = 3
    # Range that the IoU bins cover.
    # "paper": the IoUs of negatives, [0, IOU_THRESHOLDS[0]).
    # "reference": as in mmdetection, up to the highest IoU of all proposals. If ground truth is
    #     added to the proposals, this is [0, 1], so the last bin contains no negatives. Negatives
    #     without overlap are only sampled if there are not enough others.
    # Configs of published models use "reference". See libra_d2.modeling.BalancedSampler.
    cfg.MODEL.LIBRA.SAMPLER.MODE = "paper"

    # Balanced L1 loss (Section 3.3), used where BBOX_REG_LOSS_TYPE is "balanced_l1"
    cfg.MODEL.LIBRA.BALANCED_L1 = CN()
    # A smaller value increases the gradient of inliers (Figure 5). Greater than 0.
    cfg.MODEL.LIBRA.BALANCED_L1.ALPHA = 0.5
    # Upper bound of the gradient, which outliers have. Greater than 0.
    cfg.MODEL.LIBRA.BALANCED_L1.GAMMA = 1.5
    # Error at which the loss becomes linear, in units of box deltas. Greater than 0.
    cfg.MODEL.LIBRA.BALANCED_L1.BETA = 1.0
    # How the loss depends on BETA. Both options are the same if BETA is 1.
    # "scaled": the loss has the shape of the paper's for any BETA.
    # "reference": mmdetection's formula, whose gradient is not continuous at 0 and BETA.
    cfg.MODEL.LIBRA.BALANCED_L1.FORM = "scaled"

    # Training of the region proposal network (not in the paper; as in mmdetection)
    cfg.MODEL.LIBRA.RPN = CN()
    # Maximum number of sampled negative anchors for each sampled positive one in an image. An image
    # without positives counts as having one. A negative value means no limit.
    cfg.MODEL.LIBRA.RPN.MAX_NEG_PER_POS = 5
    # Number that the losses are divided by: "sampled" (the anchors that were sampled) or
    # "batch_size" (RPN.BATCH_SIZE_PER_IMAGE times the number of images, as in Detectron2).
    cfg.MODEL.LIBRA.RPN.NORMALIZER = "sampled"

    # Low-quality matches: the anchor with the highest IoU with a ground-truth box becomes positive
    # if this IoU is at least this value, in [0, 1]. It is matched with that box, or the last of
    # such boxes. A negative value, such as -1.0, gives Detectron2's rule: the anchor becomes
    # positive at any IoU and is matched with the box that it overlaps most.
    cfg.MODEL.LIBRA.RPN.LOW_QUALITY_IOU = 0.3
    # Whether anchors in the padding of an image, which is there if another image of the batch is
    # larger, are trained as background. True is as in Detectron2.
    cfg.MODEL.LIBRA.RPN.PADDING_ANCHORS = False

    # RetinaNet (not in the paper; as in mmdetection)
    cfg.MODEL.LIBRA.RETINANET = CN()
    # Number that the losses are divided by: "batch" (the foreground anchors of the batch, at least
    # one per image) or "moving_average" (as in Detectron2).
    cfg.MODEL.LIBRA.RETINANET.NORMALIZER = "batch"
    # See RPN.LOW_QUALITY_IOU.
    cfg.MODEL.LIBRA.RETINANET.LOW_QUALITY_IOU = 0.0
    # See RPN.PADDING_ANCHORS.
    cfg.MODEL.LIBRA.RETINANET.PADDING_ANCHORS = False
    # Whether there is a ReLU between P6 and P7, as in Detectron2. Use True with weights of plain
    # Detectron2 models and False with weights of mmdetection.
    cfg.MODEL.LIBRA.RETINANET.P7_RELU = False
    # Whether boxes are clipped to the image, and those without area removed, before non-maximum
    # suppression. If False, this happens after it, as in Detectron2.
    cfg.MODEL.LIBRA.RETINANET.CLIP_BOXES = True

    # Second stage (not in the paper). By default as in Detectron2.
    cfg.MODEL.LIBRA.ROI_HEADS = CN()
    # See RPN.LOW_QUALITY_IOU. mmdetection's Mask R-CNN has 0.5, its Faster and Cascade R-CNN have
    # none. Ground truth that is added to the proposals does not count.
    cfg.MODEL.LIBRA.ROI_HEADS.LOW_QUALITY_IOU = -1.0
    # Whether masks are padded as their images are before the targets of mask heads are cropped from
    # them, as in mmdetection: at the lower and right border of an image, targets then fade to the
    # background. It requires INPUT.MASK_FORMAT "bitmask", mmdetection's format; polygons have no
    # border.
    cfg.MODEL.LIBRA.ROI_HEADS.PAD_MASKS = False

    # Cascade R-CNN (not in the paper). By default as in Detectron2; configs of cascades with
    # mmdetection's recipe use its way.
    cfg.MODEL.LIBRA.CASCADE = CN()
    # Weight of the losses of each stage, such as (1.0, 0.5, 0.25), mmdetection's. Empty as in
    # Detectron2: losses of all stages have a weight of 1, and the gradients that they send to the
    # features are divided by the number of stages.
    cfg.MODEL.LIBRA.CASCADE.STAGE_LOSS_WEIGHTS = ()
    # Whether proposals are also sampled for the second and later stages, from the boxes of the
    # stage before and the ground truth, as in mmdetection. False trains them on all of these boxes.
    cfg.MODEL.LIBRA.CASCADE.RESAMPLE = False
    # What is averaged over the stages to predict classes: "probabilities" (as in Detectron2) or
    # "logits" (as in mmdetection).
    cfg.MODEL.LIBRA.CASCADE.AVERAGE = "probabilities"
    # Whether each stage has a mask head of its own, as in mmdetection. They are trained on the
    # proposals of their stage, and their masks are averaged. False gives one mask head, which is
    # trained on the proposals of the first stage.
    cfg.MODEL.LIBRA.CASCADE.MASK_HEAD_PER_STAGE = False

    # Number that losses are divided by if a batch is spread over several processes: the mean of the
    # numbers of all processes ("batch"; gradients do not depend on how the images are spread), or
    # the number of each process alone ("process"; as in mmdetection).
    cfg.MODEL.LIBRA.NORMALIZE_OVER = "batch"

    # Whether to train the scale and shift of batch norms in those stages of the backbone that are
    # not frozen, with fixed running statistics, as in mmdetection (not in the paper). It requires
    # RESNETS.NORM "FrozenBN", which trains neither if this is False.
    cfg.MODEL.LIBRA.TRAIN_NORM_AFFINE = False

    # Training
    cfg.MODEL.LIBRA.TRAINER = CN()
    # Gradient accumulation: number of micro-batches that each batch of SOLVER.IMS_PER_BATCH images
    # is split into, to save memory. It must divide the number of images of each process. Gradients
    # are those of the whole batch, and iterations count batches. 1 disables it.
    cfg.MODEL.LIBRA.TRAINER.ACCUMULATION_STEPS = 1
    # Length of the training in epochs, such as 12. SOLVER.MAX_ITER and SOLVER.STEPS are then
    # computed from the number of images and the batch size. If TEST.EVAL_PERIOD is 0, the model is
    # evaluated and a checkpoint is written after each epoch. 0 disables this: the length is
    # SOLVER.MAX_ITER. So it is, too, if the command line sets SOLVER.MAX_ITER but not this key.
    cfg.MODEL.LIBRA.TRAINER.EPOCHS = 0.0
    # Decay of an exponential moving average of the weights, in (0, 1), such as 0.9998. The averaged
    # weights are evaluated as "<task>_EMA" and saved as model_final_ema.pth. 0 disables it.
    cfg.MODEL.LIBRA.TRAINER.EMA_DECAY = 0.0
    # Metric by which the best model is chosen and saved as model_best.pth, such as "bbox/AP",
    # "bbox_EMA/AP" (averaged weights) or, with several datasets, "<dataset>/bbox/AP". Evaluations
    # must report it. "" disables it.
    cfg.MODEL.LIBRA.TRAINER.BEST_METRIC = ""
    # Early stopping: number of evaluations without a new maximum of BEST_METRIC ("bbox/AP" if that
    # is not set) after which the training stops. 0 disables it.
    cfg.MODEL.LIBRA.TRAINER.PATIENCE = 0
    # Whether evaluations also compute the losses on the validation images, as "validation/*".
    cfg.MODEL.LIBRA.TRAINER.VALIDATION_LOSS = False
    # Number of checkpoints to keep, the most recent ones. Checkpoints are written every
    # SOLVER.CHECKPOINT_PERIOD iterations; model_final.pth does not count. 0 keeps all of them.
    cfg.MODEL.LIBRA.TRAINER.MAX_CHECKPOINTS = 0

    # Speed: the same results, except for rounding, in less time (docs/benchmark.md)
    cfg.MODEL.LIBRA.SPEED = CN()
    # When to store features with the channels last in memory: "always", "large" (in inference, and
    # in training for images of at least 2^19 pixels), "inference", "never" or "auto". "auto" does
    # so where it is faster: in inference on CPUs, in training on CPUs with AVX-512, and with AVX2
    # for large images where Winograd's algorithm computes the gradients (measured); on GPUs in
    # mixed precision (known); never on Windows.
    cfg.MODEL.LIBRA.SPEED.CHANNELS_LAST = "auto"
    # Whether to fold batch norms with fixed statistics into the convolutions before them, in
    # training in layers with fewer weights than features; and whether, on CPUs, bottlenecks add the
    # result of their last convolution to the shortcut in place. Checkpoints do not change.
    cfg.MODEL.LIBRA.SPEED.FOLD_NORM = True
    # Whether RoIAlign uses all cores of a CPU instead of one, and computes its gradient on GPUs in
    # a fixed order and in less time.
    cfg.MODEL.LIBRA.SPEED.PARALLEL_ROI_ALIGN = True
    # Whether 3x3 convolutions use Winograd's algorithm (float32, on CPUs with AVX2 but not AVX-512,
    # and on AMD's Zen 4).
    cfg.MODEL.LIBRA.SPEED.WINOGRAD = True
    # Whether Detectron2's FPN frees each feature map after its last use, which saves memory in
    # inference.
    cfg.MODEL.LIBRA.SPEED.LEAN_FPN = True
    # Whether the process of a model on a CPU keeps memory that was freed, and uses it again (Linux
    # with glibc). Memory grows if a script keeps the tensors of each image.
    cfg.MODEL.LIBRA.SPEED.KEEP_FREED_MEMORY = False
    # Type that SOLVER.AMP computes in, in training and evaluation: "float16" (GPUs only),
    # "bfloat16" (needs no loss scaling), or "auto" (float16 on GPUs, as in Detectron2, and bfloat16
    # on CPUs).
    cfg.MODEL.LIBRA.SPEED.AMP_DTYPE = "auto"
    # Whether to compile the backbone with torch.compile. This takes minutes at the start, on CPUs
    # many, in which signals wait.
    cfg.MODEL.LIBRA.SPEED.COMPILE_BACKBONE = False

    # Number of images whose detections are drawn next to the ground truth at each evaluation. The
    # pictures are saved in OUTPUT_DIR/pictures. 0 disables it.
    cfg.MODEL.LIBRA.NUM_PICTURES = 0
