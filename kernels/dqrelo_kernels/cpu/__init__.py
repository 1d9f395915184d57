# SPDX-License-Identifier: Apache-2.0
"""The ops in native code, built for the machine at start-up."""
