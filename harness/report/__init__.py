# SPDX-License-Identifier: Apache-2.0
"""Renders verdicts and runs as HTML, Markdown and JSON."""
