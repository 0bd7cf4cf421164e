# SPDX-License-Identifier: Apache-2.0
"""The oldest versions of PyTorch and Detectron2 that this package works with."""

import importlib

__all__ = ["OLDEST", "check_versions"]

OLDEST = {"torch": ("PyTorch", "2.6"), "detectron2": ("Detectron2", "0.6")}


def check_versions() -> None:
    """
    Raises:
        ImportError: if PyTorch or Detectron2 is missing or too old.
    """
    for module, (name, oldest) in OLDEST.items():
        try:
            version = importlib.import_module(module).__version__
        except ModuleNotFoundError as e:
            if e.name != module:
                raise
            version = None
        from torch.torch_version import TorchVersion  # compares versions, not text

        if version is None or TorchVersion(version) < oldest:
            found = f"{version} is installed" if version else "it is not installed"
            raise ImportError(
                f"libra_d2 needs {name} {oldest} or later, but {found}: docs/installation.md says "
                "how to install it",
                name=module,
            )
