# SPDX-License-Identifier: Apache-2.0
"""Files, random states and names: what any part of the package may use."""
