# SPDX-License-Identifier: Apache-2.0
"""Planted faults, and the gates that must find them."""
