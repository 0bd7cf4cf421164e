# SPDX-License-Identifier: Apache-2.0
"""How long a training is, in epochs and in iterations."""

import logging
import math
from fractions import Fraction

from ..errors import counted
from .recipe import Recipe

__all__ = ["set_length"]

logger = logging.getLogger(__name__)

# Lengths beyond these are rarely meant: fine-tuning takes tens of epochs.
_MANY_EPOCHS, _FEW_EPOCHS = 200, 1
# Of the training: with few images, a warm-up that is meant for many would be most of it.
_LONGEST_WARMUP, _LONG_WARMUP = 1 / 10, 1 / 3


def set_length(recipe: Recipe, num_images: int) -> None:
    """
    Turn :attr:`Recipe.epochs`, if it is set, into iterations: those of the training and, in
    proportion, the steps of the schedule; a tenth of them at most are for the warm-up. Each epoch
    ends with an evaluation and a checkpoint, unless the config has an evaluation period. Log the
    length, and what may be a mistake.

    Args:
        recipe: changed in place.
        num_images: that are trained on.
    """
    per_epoch = Fraction(num_images, recipe.batch_size)
    steps = recipe.get("SOLVER.STEPS", ())
    late = [step for step in steps if step >= recipe.max_iter]
    if recipe.epochs > 0:
        before = recipe.max_iter
        recipe.max_iter = math.ceil(Fraction(str(recipe.epochs)) * per_epoch)
        if recipe.has("SOLVER.STEPS"):
            scaled = {round(step / before * recipe.max_iter) for step in steps}
            recipe.set("SOLVER.STEPS", tuple(sorted(x for x in scaled if 0 < x < recipe.max_iter)))
        if recipe.has("SOLVER.WARMUP_ITERS"):
            longest = int(recipe.max_iter * _LONGEST_WARMUP)
            recipe.set("SOLVER.WARMUP_ITERS", min(recipe.get("SOLVER.WARMUP_ITERS"), longest))
        if recipe.eval_period == 0 and recipe.test_datasets:
            recipe.eval_period = math.ceil(per_epoch)
            recipe.checkpoint_period = recipe.eval_period
    max_iter, epochs = recipe.max_iter, float(recipe.max_iter / per_epoch)
    logger.info(
        f"The training has {counted(max_iter, 'iteration')} of "
        f"{counted(recipe.batch_size, 'image')}: {epochs:.3g} epochs of "
        f"{counted(num_images, 'image')}"
    )
    name = recipe.name_of("max_iter")
    if not _FEW_EPOCHS <= epochs <= _MANY_EPOCHS:
        logger.warning(
            f"{name} {max_iter} is {epochs:.3g} epochs of {counted(num_images, 'image')}: "
            f"{recipe.name_of('epochs')} sets the length in epochs"
        )
    if late and recipe.get("SOLVER.LR_SCHEDULER_NAME") == "WarmupMultiStepLR":
        logger.warning(
            f"SOLVER.STEPS {tuple(steps)}: the learning rate is not reduced at {late[0]}, because "
            "the training ends earlier"
        )
    warmup = recipe.get("SOLVER.WARMUP_ITERS", 0)
    if warmup > max_iter * _LONG_WARMUP:
        logger.warning(
            f"SOLVER.WARMUP_ITERS {warmup} is more than a third of the training, which has "
            f"{counted(max_iter, 'iteration')}: the learning rate reaches "
            f"{recipe.name_of('learning_rate')} late or never, and the model may learn next to "
            f"nothing. Use {math.ceil(max_iter * _LONGEST_WARMUP)} or fewer"
        )
    period = recipe.eval_period
    if recipe.test_datasets and not 0 < period < max_iter:
        logger.warning(
            f"{recipe.name_of('eval_period')} is {period}: the model is evaluated only at the end "
            f"of the training, after {counted(max_iter, 'iteration')}"
        )
