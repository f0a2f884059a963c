"""Benches: one group a question, ours and every peer in it, timed in pairs.

``pytest bench -k quick`` runs the small ones; ``python -m bench`` records all the others under ``bench/results``.
How the times come about: ``paired.py``. What they were measured on: ``machine.py``. Tables and figures: ``report.py``.
"""
