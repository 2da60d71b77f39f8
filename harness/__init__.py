# SPDX-License-Identifier: Apache-2.0
"""Launches, measures, grades and reports; imports no torch."""
