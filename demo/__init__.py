# SPDX-License-Identifier: Apache-2.0
"""The demo, installed as ``libra_d2.demo``."""
