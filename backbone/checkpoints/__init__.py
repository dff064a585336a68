"""Checkpoints as they are published: files, shards, key layouts, and how a model is filled."""

from backbone.checkpoints.files import Checkpoint, Shard, open_checkpoint
from backbone.checkpoints.hub import download
from backbone.checkpoints.layouts import LAYOUTS
from backbone.checkpoints.loading import assign, fill, find_plan, to_published
from backbone.checkpoints.planning import Plan, plan_loading
from backbone.checkpoints.rules import Layout

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "Layout",
    "Plan",
    "Shard",
    "assign",
    "download",
    "fill",
    "find_plan",
    "open_checkpoint",
    "plan_loading",
    "to_published",
]
