# SPDX-License-Identifier: Apache-2.0
"""Builders of WebDatasets from the formats people have."""
