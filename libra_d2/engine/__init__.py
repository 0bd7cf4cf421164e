# SPDX-License-Identifier: Apache-2.0
from .hooks import StopOnSignal
from .processes import join_processes, started_by_launcher
from .watched_loader import WatchedLoader

__all__ = ["StopOnSignal", "WatchedLoader", "join_processes", "started_by_launcher"]
