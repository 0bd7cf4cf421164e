# SPDX-License-Identifier: Apache-2.0
"""Where models differ on the same images: by metric, by image and by object."""

import warnings
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from scipy import stats

from ..errors import ArgumentError
from .detection_metrics import ERROR_METRICS, METRICS, DetectionMetrics, plain_values
from .significance import PairedTest, holm_correction, paired_t_test, sign_test, verdict

__all__ = ["compare_images", "compare_metrics", "compare_objects", "compare_runs"]

_OBJECT_METRICS = ("objects found", "IoU of objects that both find")


def _found(a: DetectionMetrics, b: DetectionMetrics) -> np.ndarray:
    """
    (2 models, IoU and score, G) of the detections that find each object at an IoU of 0.5, or NaN.
    Raises: ArgumentError: if the objects are not the same.
    """
    first, second = a.matches, b.matches
    if (first.image_ids, first.object_ids) != (second.image_ids, second.object_ids):
        raise ArgumentError("b", b, "use results on the same images and objects as those of a")
    found = np.full((2, 2, len(first.object_ids)), np.nan)
    for model, m in enumerate((first, second)):
        finders = m.finders()
        objects = np.flatnonzero(finders >= 0)
        found[model][:, objects] = m.found_iou[finders[objects]], m.score[finders[objects]]
    return found


def compare_objects(a: DetectionMetrics, b: DetectionMetrics) -> List[Dict[str, Any]]:
    """
    Which objects two models find at an IoU of 0.5, with whatever score, and how well.

    Returns:
        one row for each object that counts, with "image_id", "annotation_id", "class", and for each
        model the IoU and the score, "iou_a", "score_a", "iou_b" and "score_b", or None if it does
        not find the object.

    Raises:
        ArgumentError: if the objects of the two are not the same.
    """
    m, values = a.matches, plain_values(_found(a, b).reshape(4, -1).T.tolist())
    names = ("iou_a", "score_a", "iou_b", "score_b")
    return [
        {
            "image_id": m.image_ids[m.object_image[i]],
            "annotation_id": m.object_ids[i],
            "class": m.class_names[m.object_class[i]],
            **dict(zip(names, values[i])),
        }
        for i in np.flatnonzero(m.object_counts[0])
    ]


def compare_images(*pairs: Tuple[DetectionMetrics, DetectionMetrics]) -> List[Dict[str, Any]]:
    """
    How two models do in each image.

    Args:
        pairs: of a run of the first and one of the second model. Values are means over the pairs.

    Returns:
        one row for each image, those that b loses most in first and those without objects last,
        with "image_id", the AP of each model in it, "a" and "b", and their "difference", in percent
        or None, and how many objects "only_a" and "only_b" find at an IoU of 0.5.

    Raises:
        ArgumentError: if the objects of the two are not the same.
    """
    m, values = pairs[0][0].matches, []
    for a, b in pairs:
        in_a, in_b = ~np.isnan(_found(a, b)[:, 0])
        only = (in_a & ~in_b, in_b & ~in_a)
        counts = [np.bincount(m.object_image, x, len(m.image_ids)) for x in only]
        values.append([a.image_precision(), b.image_precision(), *counts])
    own_a, own_b, *counts = np.mean(values, axis=0)
    columns = (m.image_ids, own_a, own_b, own_b - own_a, *counts)
    names = ("image_id", "a", "b", "difference", "only_a", "only_b")
    order = np.argsort(own_b - own_a, kind="stable")
    return [plain_values({k: x[i] for k, x in zip(names, columns)}) for i in order]


def _object_sums(a: DetectionMetrics, b: DetectionMetrics) -> np.ndarray:
    """
    (2 models and what to divide them by, 2 metrics, images), sums over the objects of an image, for
    the objects found and the IoU of objects that both find.
    """
    m, found = a.matches, _found(a, b)[:, 0]
    both = ~np.isnan(found).any(0)
    values = [*((~np.isnan(x), np.where(both, x, 0)) for x in found), (m.object_counts[0], both)]
    size = len(m.image_ids)
    return np.array([[np.bincount(m.object_image, y, size) for y in x] for x in values])


def _values(
    a: DetectionMetrics, b: DetectionMetrics, sums: np.ndarray, weights: Optional[np.ndarray] = None
) -> np.ndarray:
    """(2 models, ..., metrics): all rows of :func:`compare_metrics`, in percent."""
    weights = np.ones(sums.shape[-1], dtype=int) if weights is None else weights
    of_objects = np.moveaxis(sums @ weights.T, 1, -1)
    own = np.stack([a.values(weights), b.values(weights)])
    with np.errstate(invalid="ignore"):
        return np.concatenate([own, 100 * of_objects[:2] / of_objects[2]], axis=-1)


def _test_on_images(
    a: DetectionMetrics, b: DetectionMetrics, resamples: int, level: float, seed: int
) -> Tuple[np.ndarray, PairedTest]:
    """The values of one pair of models, and a bootstrap test of their differences."""
    sums, num = _object_sums(a, b), len(a.matches.image_ids)
    own = _values(a, b, sums)
    draws = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), resamples)
    # A few at a time, which need not leave the processor's cache.
    num_chunks = 1 + resamples * max(len(x.matches.score) for x in (a, b)) // 50_000
    chunks = np.array_split(draws, min(resamples, num_chunks))
    samples = np.concatenate([np.subtract(*_values(a, b, sums, x)[::-1]) for x in chunks])

    difference = own[1] - own[0]
    num_images = np.array([*a.num_images(), *(sums[2] > 0).sum(-1)], dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of metrics without objects, or one image
        low, high = np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        error = np.nanstd(samples, axis=0, ddof=1) * np.sqrt(num_images / (num_images - 1))
        p_values = 2 * stats.t.sf(np.abs(difference) / error, num_images - 1)
        half = error * stats.t.ppf((1 + level) / 2, num_images - 1)
    # Of few images, the samples vary too little; NaN is ignored.
    low, high = np.fmin(low, difference - half), np.fmax(high, difference + half)
    p_values = np.maximum(p_values, 0.5 ** (num_images - 1))
    test = PairedTest(difference, error, low, high, p_values)
    return own, sign_test(test, num_images, level)


def _judge(tests: Sequence[Tuple[np.ndarray, PairedTest]], level: float) -> List[List[Dict]]:
    """Tables of values and their differences, with verdicts that hold for all of them together."""
    p_values = iter(holm_correction([p for _, test in tests for p in test.p_value.tolist()]))
    tables, names = [], (*METRICS, *_OBJECT_METRICS)
    better = np.where(np.isin(names, ERROR_METRICS), -1, 1)
    keys = ("metric", "a", "b", "difference", "low", "high", "p_value", "says")
    for own, test in tests:
        rows = []
        for i, name in enumerate(names):
            p_value, ends = next(p_values), (test.low[i], test.high[i])
            says = verdict(*sorted(better[i] * x for x in ends), p_value, level)
            row = (name, own[0, i], own[1, i], test.mean[i], *ends, p_value, says)
            rows.append(plain_values(dict(zip(keys, row))))
        tables.append(rows)
    return tables


def compare_metrics(
    a: DetectionMetrics,
    b: DetectionMetrics,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> List[Dict[str, Any]]:
    """
    The differences of b to a in all metrics, and whether they can be told from chance.

    Images are drawn with replacement, the same ones for both models, again and again. The p-value
    is that of a t-test, with the standard deviation of these samples as standard error and one
    degree of freedom less than there are images with such objects; it is at least that of a sign
    test on which all these images agree. Holm's method corrects it for the number of rows. The
    interval is that of the t-test, widened to the middle of the samples where that reaches further;
    it is not corrected. A row says "helps" or "harms" if the interval excludes 0 and the corrected
    p-value is at most 1 - ``level``, so that where nothing differs the whole table says neither
    with a probability of about ``level``.

    That is about these two models on other images. Trained again, both would differ, too.

    Args:
        a, b: two models on the same images.
        resamples: how many times images are drawn.
        level: of each interval, and of all verdicts together.
        seed: of the draws.

    Returns:
        one row for each of :data:`METRICS`, for the share of objects found at an IoU of 0.5, and
        for the mean IoU of those that both find, with "metric", "a", "b", "difference", "low" and
        "high", all in percent or None; the corrected "p_value"; and what it "says" of b. Of errors,
        fewer are better.

    Raises:
        ArgumentError: if the objects of the two are not the same.
    """
    return _judge([_test_on_images(a, b, resamples, level, seed)], level)[0]


def compare_runs(
    models: Sequence[Sequence[Tuple[DetectionMetrics, DetectionMetrics]]],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> List[List[Dict[str, Any]]]:
    """
    The differences of several models to one that all are compared with.

    With two pairs of runs or more, the test is a paired t-test over them: it is about trainings
    with other seeds, evaluated on the same images. With one pair it is that of
    :func:`compare_metrics`, about the same two weights on other images.

    Args:
        models: for each, the pairs of a run of the first model and one of this model, which have
            the same seed.
        level: of each interval, and of all verdicts in all tables together, see Holm's method in
            :func:`compare_metrics`.
        seed: of the draws of images.

    Returns:
        for each of ``models`` a table, see :func:`compare_metrics`, whose values are means.

    Raises:
        ArgumentError: if the objects of a pair are not the same.
    """
    tests = []
    for pairs in models:
        if len(pairs) == 1:
            tests.append(_test_on_images(*pairs[0], 1000, level, seed))
            continue
        own = np.stack([_values(*x, _object_sums(*x)) for x in pairs])
        tests.append((own.mean(axis=0), paired_t_test(own[:, 1] - own[:, 0], level)))
    return _judge(tests, level)
