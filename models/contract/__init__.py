# SPDX-License-Identifier: Apache-2.0
"""What the harness and the implementation agree on; torch-free."""
