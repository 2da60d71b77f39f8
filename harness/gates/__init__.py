# SPDX-License-Identifier: Apache-2.0
"""Gates: pure functions from a run and its baseline to a GateResult."""
