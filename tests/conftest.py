"""Settings that must stand before anything is imported."""

import os

# No test may reach for weights: without a network the hub client would retry for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and threads that wait for busy cores cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
