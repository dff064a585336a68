"""What a refined backbone is: pixels, registers, a vision transformer, and the artifact."""

from backbone.artifact import (
    Artifact,
    Manifest,
    RegisterBorder,
    is_artifact,
    load_artifact,
    read_manifest,
    save_artifact,
)
from backbone.devices import find_devices
from backbone.encoder import (
    DenseEncoder,
    Precision,
    has_bf16_matrix_units,
    multiplies_bf16,
    open_model,
)
from backbone.vit import AttentionTaps, Backbone, DenseFeatures

__all__ = [
    "Artifact",
    "AttentionTaps",
    "Backbone",
    "DenseEncoder",
    "DenseFeatures",
    "Manifest",
    "Precision",
    "RegisterBorder",
    "find_devices",
    "has_bf16_matrix_units",
    "multiplies_bf16",
    "is_artifact",
    "load_artifact",
    "open_model",
    "read_manifest",
    "save_artifact",
]
