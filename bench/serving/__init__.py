"""Converted models in real engines: do they say the same, and how fast. One command, `python -m bench.serving`.

worker.py    runs in an engine's own environment and knows nothing of this project; engines/ has what it drives
process.py   starts it and talks to it          compare.py   its answers beside the exact model's
"""
