# SPDX-License-Identifier: Apache-2.0
"""Arguments that the command line programs share."""

import argparse

__all__ = ["add_data_arguments", "argument_parser", "config_argument_parser"]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`libra_d2.engine.setup.register_own_data` reads."""
    data = parser.add_argument_group(
        "your own data", "in COCO format; replaces DATASETS.* and sets the number of classes"
    )
    for split in ("train", "val"):
        data.add_argument(
            f"--{split}-json",
            metavar="FILE",
            help=f"annotations to {'train' if split == 'train' else 'evaluate'} on",
        )
        data.add_argument(f"--{split}-images", metavar="DIR", help="folder of the images")
        data.add_argument(
            f"--{split}-proposals",
            metavar="FILE",
            help="proposals for the images; only for models without an RPN (MODEL.LOAD_PROPOSALS)",
        )


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows the lines of ``description`` as they are."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def config_argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--config-file`` and, after all options, the ``opts`` of read_config."""
    parser = argument_parser(description)
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE or NAME",
        help="a file, or a name in the model zoo",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="KEY VALUE pairs that override the config; key=value for a LazyConfig",
    )
    return parser
