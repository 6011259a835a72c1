"""Fast recurrent encoder-decoder models for PyTorch."""

__version__ = "0.1.0"
