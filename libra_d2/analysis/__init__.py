# SPDX-License-Identifier: Apache-2.0
"""What balanced learning does in a model: numbers and figures of the paper's three imbalances."""

from .feature_level import feature_statistics, plot_heat_maps, plot_levels
from .objective_level import box_loss_name, objective_statistics, plot_gradient_shares, plot_losses
from .recording import Recording, record
from .sample_level import plot_sampling, sample_statistics

__all__ = [
    "Recording",
    "box_loss_name",
    "feature_statistics",
    "objective_statistics",
    "plot_gradient_shares",
    "plot_heat_maps",
    "plot_levels",
    "plot_losses",
    "plot_sampling",
    "record",
    "sample_statistics",
]
