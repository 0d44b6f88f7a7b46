"""Synthetic chest CTs with reports, labels and questions, in CT-RATE's own layout.

dataset.py writes the tree; a Patient (patient.py) has findings (findings.py), an anatomy (anatomy.py) in
which they are drawn (drawing.py, canvas.py), a report (reports.py, sentences.py) that labeler.py reads back,
and questions.
"""
