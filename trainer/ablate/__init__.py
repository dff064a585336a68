"""The paper's ablations as one sweep: python -m trainer.ablate."""
