"""The models and recurrences in plain PyTorch: oracle, fallback and documentation of the rest."""
