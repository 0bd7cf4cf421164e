# SPDX-License-Identifier: Apache-2.0
"""Files, random states and class names: what the whole package may use."""
