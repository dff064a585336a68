"""The cache of features: in this process, and in a Redis that replicas share.

It never makes an answer wrong and never fails a request: what it cannot say is a miss, counted in
the metrics `refinery_cache_*`.
"""

from service.cache.entry import CorruptEntryError, Entry
from service.cache.metrics import CacheMetrics
from service.cache.store import FeatureCache, build_cache

__all__ = ["CacheMetrics", "CorruptEntryError", "Entry", "FeatureCache", "build_cache"]
