"""The weights of models: named on the hub or at an address, fetched once, and found on this disk."""

from __future__ import annotations

from llamesh.local.weights.cache import Cache, find_cache
from llamesh.local.weights.errors import WeightsError
from llamesh.local.weights.owner import Weights
from llamesh.local.weights.progress import Progress

__all__ = ["Cache", "Progress", "Weights", "WeightsError", "find_cache"]
