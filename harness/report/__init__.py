# SPDX-License-Identifier: Apache-2.0
"""The report: run directories in, self-contained HTML, Markdown and JSON out."""
