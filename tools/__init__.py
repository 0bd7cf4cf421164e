# SPDX-License-Identifier: Apache-2.0
"""The command line programs, installed as ``libra_d2.tools``."""
