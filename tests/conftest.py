"""Settings that must stand before anything is imported."""

import os

# No test may reach for weights: without a network the hub client would retry for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
