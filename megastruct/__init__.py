"""megastruct: pretrain transformers whose feed-forward layers are structured matrices."""

__version__ = "0.1.0"
