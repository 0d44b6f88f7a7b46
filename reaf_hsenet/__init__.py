"""REAF and HSENet: 3D CT vision-language learning in plain PyTorch."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`reaf_hsenet.load`, found when it is asked for: torch takes seconds to import."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reaf_hsenet.evaluate.scan_model import load

    return load
