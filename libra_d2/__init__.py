# SPDX-License-Identifier: Apache-2.0
"""
Libra R-CNN (Pang et al., CVPR 2019) for Detectron2.

Importing the package registers its components in Detectron2's registries, and ``libra://``, the
names of its model zoo, with Detectron2's path manager. It changes nothing else.
"""

__version__ = "0.1.0"

from .versions import check_versions

check_versions()  # before anything that needs them

from . import model_zoo, modeling  # noqa: E402
from .config import add_libra_config  # noqa: E402

__all__ = ["add_libra_config", "model_zoo", "modeling"]
