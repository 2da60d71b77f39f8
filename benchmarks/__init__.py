# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: programs that measure; none of them is a test."""

from models.contract.driver import set_driver_defaults

set_driver_defaults()  # as trainings do, and before a benchmark's own imports, which start the driver
