"""Deterministic tensors from (name, shape, seed), so that a golden case needs no stored weights.

The rule: a PCG64 stream seeded with [crc32 of the name, seed] gives standard normals z in float32. A weight
is 1 + 0.1 z (scalars, and vectors whose name ends in `weight`), 0.02 z (other vectors), 0.5 z (three
dimensions: class tokens and position tables), else z / sqrt(fan-in).
"""

import math
import zlib

import numpy as np


def stream(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))


def normal(name: str, shape, seed: int = 0) -> np.ndarray:
    return stream(name, seed).standard_normal(tuple(shape), dtype=np.float32)


def fill(name: str, shape, seed: int = 0) -> np.ndarray:
    """A weight tensor of a published checkpoint's name."""
    z = normal(name, shape, seed)
    if len(shape) == 0 or (len(shape) == 1 and name.endswith("weight")):
        return (1 + np.float32(0.1) * z).astype(np.float32)
    if len(shape) == 1:
        return (np.float32(0.02) * z).astype(np.float32)
    if len(shape) == 3:
        return (np.float32(0.5) * z).astype(np.float32)
    return (z / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


def volume(name: str, shape, seed: int = 0) -> np.ndarray:
    """An image in [0, 1]."""
    return np.clip(np.float32(0.5) + np.float32(0.25) * features(name, shape, seed), 0, 1)


def features(name: str, shape, seed: int = 0) -> np.ndarray:
    return normal("input:" + name, shape, seed)


def token_ids(name: str, shape, vocab_size: int, seed: int = 0) -> np.ndarray:
    return stream("ids:" + name, seed).integers(0, vocab_size, tuple(shape), dtype=np.int64)
