# SPDX-License-Identifier: Apache-2.0
"""A server under load, beside other ways to serve."""
