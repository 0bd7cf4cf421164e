# SPDX-License-Identifier: Apache-2.0
"""Training, and what the programs share: arguments, configs, processes, errors in one line."""

from .arguments import add_data_arguments, argument_parser, config_argument_parser
from .launch import launch, report_errors
from .output_dir import prepare_output_dir, title_of
from .predictor import LibraPredictor
from .setup import prepare_proposal_files, read_config, register_own_data, setup
from .trainer import Trainer

__all__ = [
    "LibraPredictor",
    "Trainer",
    "add_data_arguments",
    "argument_parser",
    "config_argument_parser",
    "launch",
    "prepare_output_dir",
    "prepare_proposal_files",
    "read_config",
    "register_own_data",
    "report_errors",
    "setup",
    "title_of",
]
