# SPDX-License-Identifier: Apache-2.0
"""Training, and what the programs share: arguments, configs, processes, errors in one line."""

from .arguments import add_data_arguments, config_argument_parser
from .hooks import CheckpointHook, StopOnSignal
from .launch import join_processes, launch, read_environment, report_errors
from .output_dir import prepare_output_dir
from .predictor import LibraPredictor
from .setup import prepare_proposal_files, read_config, register_own_data, setup
from .trainer import Trainer
from .watched_loader import WatchedLoader

__all__ = [
    "CheckpointHook",
    "LibraPredictor",
    "StopOnSignal",
    "Trainer",
    "WatchedLoader",
    "add_data_arguments",
    "config_argument_parser",
    "join_processes",
    "launch",
    "prepare_output_dir",
    "prepare_proposal_files",
    "read_config",
    "read_environment",
    "register_own_data",
    "report_errors",
    "setup",
]
