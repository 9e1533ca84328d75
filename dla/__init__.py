"""Dynamic Layer Attention networks: layers, models and training."""
