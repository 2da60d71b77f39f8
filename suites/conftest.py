# SPDX-License-Identifier: Apache-2.0
"""Nothing to configure: recipes beside a test become its cases, and the plugin in ``harness.plugin`` does the rest."""
