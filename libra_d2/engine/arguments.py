# SPDX-License-Identifier: Apache-2.0
"""Arguments that the command line programs share."""

import argparse

__all__ = ["add_data_arguments", "config_argument_parser"]


def add_data_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """
    Add the arguments that :func:`libra_d2.engine.setup.register_own_data` reads; with ``required``,
    annotations and images of both splits must be given.
    """
    data = parser.add_argument_group(
        "your own data", "in COCO format; sets the number of classes. Instead of DATASETS.*"
    )
    for split in ("train", "val"):
        data.add_argument(
            f"--{split}-json",
            metavar="FILE",
            required=required,
            help=f"annotations to {'train' if split == 'train' else 'evaluate'} on",
        )
        data.add_argument(
            f"--{split}-images", metavar="DIR", required=required, help="where their images are"
        )
        data.add_argument(
            f"--{split}-proposals",
            metavar="FILE",
            help="their proposals, for models without RPN (MODEL.LOAD_PROPOSALS)",
        )


def config_argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--config-file`` and, after all options, the ``opts`` of read_config."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE or NAME")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser
