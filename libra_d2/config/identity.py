# SPDX-License-Identifier: Apache-2.0
"""What a run is, to notice when another one is continued or its results are used."""

import logging
import re
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence

import yaml

from detectron2.data import MetadataCatalog

from .. import __version__
from ..data.fingerprint import file_digest, fingerprint
from ..errors import InputError
from ..utils.leaves import leaves

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = [
    "RunIdentity",
    "changed_values",
    "check_classes",
    "describe",
    "identify",
    "learned_classes",
]

logger = logging.getLogger(__name__)

_SPLITS = {"train": "training data", "test": "validation data"}

# Places and what changes no number; all of it may differ when a run is continued.
_FREE = re.compile(
    r"OUTPUT_DIR|VERSION|MODEL\.WEIGHTS|train\.output_dir|train\.init_checkpoint"
    r"|DATASETS\.PROPOSAL_FILES_\w+|dataloader\.\w+\.dataset\.proposal_files.*"
    r"|DATALOADER\.NUM_WORKERS|dataloader\.\w+\.num_workers"
    r"|MODEL\.LIBRA\.INPUT\.CHECK_IMAGES|train\.check_images"
)
_DIGEST = re.compile(rf"(?:{'|'.join(_SPLITS.values())}) '(.*)' (annotations|images|proposals)")
_PLACES = {"annotations": "json_file", "images": "image_root"}  # in the metadata of a dataset
# The position in the data order and the weights are meaningless with other data and other parts.
_FIXED = re.compile(
    rf"{_SPLITS['train']} .*|DATASETS\.TRAIN|dataloader\.train\.dataset\..*"
    r"|MODEL\.(META_ARCHITECTURE|.*\.NAME)|(model|optimizer)\.(.*\.)?_target_"
)


class _PlainLoader(yaml.SafeLoader):
    """Reads Python objects in a saved LazyConfig as lists and names, and executes nothing."""


def _without_objects(loader: yaml.Loader, name: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return name


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _without_objects)


def describe(recipe: "Recipe", splits: Sequence[str] = ("test",)) -> Dict[str, Any]:
    """
    The version of this package, and what the datasets of a recipe and their proposals consist of,
    see :func:`fingerprint`. Plain values by their name in words.
    """
    found: Dict[str, Any] = {"libra_d2": __version__}
    for split in splits:
        names, files = getattr(recipe, f"{split}_datasets"), getattr(recipe, f"{split}_proposals")
        for name in names:
            for what, value in fingerprint(name).items():
                found[f"{_SPLITS[split]} {name!r} {what}"] = value
        for name, file in zip(names, files if recipe.needs_proposals else ()):
            found[f"{_SPLITS[split]} {name!r} proposals"] = file_digest(file)
    return found


def identify(recipe: "Recipe") -> Dict[str, Any]:
    """
    What a run is: each value of its config by its name, and see :func:`describe`. A checkpoint or a
    JSON file can keep it.
    """
    config = yaml.load(recipe.dump(), Loader=_PlainLoader)
    return {**dict(leaves(config)), **describe(recipe, tuple(_SPLITS))}


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> Dict[str, str]:
    """
    Args:
        before, now: see :func:`identify`.

    Returns:
        for each value that differs and matters, a clause that says how.
    """
    names = sorted(name for name in {**before, **now} if not _FREE.fullmatch(name))
    absent = object()
    found = {}
    for name in names:
        old, new = before.get(name, absent), now.get(name, absent)
        if old != new:
            old, new = ("absent" if x is absent else repr(x) for x in (old, new))
            clause = f"{name} is {new}, but was {old} before"
            if match := _DIGEST.fullmatch(name):
                place = _place(*match.groups())
                clause = f"{name}{place} have changed, from {old} to {new} (digests of the content)"
            found[name] = clause
    return found


def _place(dataset_name: str, what: str) -> str:
    """Where the annotations or images of a dataset are, in parentheses; "" if it is not known."""
    is_registered = dataset_name in MetadataCatalog.list()
    metadata = MetadataCatalog.get(dataset_name).as_dict() if is_registered else {}
    place = metadata.get(_PLACES.get(what))
    return f" ({place})" if place else ""


class RunIdentity:
    """
    The identity of a run as a part of its checkpoints, see :class:`LibraCheckpointer`, which
    compares it when the run is resumed.
    """

    def __init__(self, values: Dict[str, Any]):
        """Args: values: see :func:`identify`."""
        self.values = values
        #: whether it was compared with that of a checkpoint
        self.is_compared = False

    @property
    def validation_data(self) -> Dict[str, Any]:
        """What is known of it, see :func:`describe`."""
        return {k: v for k, v in self.values.items() if k.startswith(_SPLITS["test"])}

    def state_dict(self) -> Dict[str, Any]:
        """What a checkpoint keeps."""
        return self.values

    def load_state_dict(self, before: Dict[str, Any]) -> None:
        """
        Compare with the run that a checkpoint belongs to, and log what differs.

        Raises:
            InputError: if training data, classes, or parts of the model differ.
        """
        self.is_compared = True
        found = changed_values(before, self.values)
        fixed = [clause for name, clause in found.items() if _FIXED.fullmatch(name)]
        if fixed:
            raise InputError(
                f"the run in the output directory cannot be resumed: {'; '.join(fixed)}. To go on "
                "from its weights, start a training with them in another output directory"
            )
        for clause in found.values():
            logger.warning(f"Resuming: {clause}")


def learned_classes(run: Mapping[str, Any]) -> List[List[str]]:
    """The classes of each dataset of a training that says so; ``run`` is its :func:`identify`."""
    return [
        classes
        for name, classes in run.items()
        if re.fullmatch(r"training data .* classes", name) and classes
    ]


def check_classes(run: Mapping[str, Any], datasets: Sequence[str]) -> None:
    """
    Check that a model has learned the classes of the datasets that it is evaluated on.

    Args:
        run: identity of its training, see :func:`identify`; may be empty.
        datasets: registered datasets.

    Raises:
        InputError: if they differ.
    """
    learned = learned_classes(run)
    for dataset in datasets:
        classes = list(MetadataCatalog.get(dataset).get("thing_classes") or ())
        if learned and classes and classes not in learned:
            raise InputError(
                f"the model was trained on the classes {learned[0]}, but dataset {dataset!r} has "
                f"{classes}: evaluate it on data with the same ones, in the same order"
            )
