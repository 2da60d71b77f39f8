# SPDX-License-Identifier: Apache-2.0
"""Samples on disk, chat template and masks, packing, loading."""
