"""Synthetic chest CTs with reports, labels and questions, in CT-RATE's own layout.

dataset.py writes the files. A Patient (patient.py) has findings (findings.py), which are drawn (drawing.py)
into an anatomy (anatomy.py) on a grid of voxels (canvas.py). reports.py states the findings in the words of
sentences.json, labeler.py reads them back, and questions.py asks for them.
"""
