"""REAF and HSENet: 3D CT vision-language learning in plain PyTorch."""

__version__ = "0.1.0"
