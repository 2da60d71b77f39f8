# SPDX-License-Identifier: Apache-2.0
"""Pytest suites that drive the harness."""
