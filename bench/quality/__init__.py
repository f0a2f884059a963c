"""What the method is worth on real models and real text.

fetch.py     the model, the corpus and the tasks out of packages        text.py    documents of each source, their split
tasks.py     the six tasks from ready requests, scored
run.py, presets.py  one JSON a result                                    report.py  table and figure (intervals.py, figure.py)
settings.py  dense models, tokens, held-out documents                   measuring.py  what a result says
methods.py   the registry of methods                                    ablations.py  of what is changed in dot
clusterings.py, pruning.py, layers.py, transports.py                    what those do beside the package's own
"""
