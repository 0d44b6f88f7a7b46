"""Published checkpoints: read (files.py), recognised (published.py), renamed (names.py), understood
(shapes.py).

    python -m reaf_hsenet.weights convert FILE RUN
    python -m reaf_hsenet.weights export RUN OUT --format {m3d-clip,hlip,reaf,transformers}

docs/weights.md says where each comes from and what it is for. Only tensors are ever unpickled, and nothing is
downloaded unless a hub id (ORGANISATION/NAME, or ORGANISATION/NAME@REVISION) is given where a folder is
expected.
"""
