# SPDX-License-Identifier: Apache-2.0
"""The implementation: model, data, conversion, training, generation. Never imports harness."""
