# SPDX-License-Identifier: Apache-2.0
"""pytest plugin of the harness."""
