# SPDX-License-Identifier: Apache-2.0
"""What a worker checks of itself, on its own device, before it takes a request."""
