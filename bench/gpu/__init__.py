"""The benches on a GPU: ``python -m bench.gpu first``, then ``second``; ``--part`` runs one part's tests and benches in full.

first.py      smoke, compile, tests, headline benches within minutes    second.py    alignment, training, profiles
session.py    the record, the stages, the children's surroundings      dry.py       the first call without a GPU
budget.py     minutes into stages                                       children.py  processes with a limit
worker.py     what a child does                                         fake.py      ops up to the compiler without a device
cases.py      every op against torch                                    headline.py  which benches, and their targets
suite.py      a part in full; experts.py ... transport.py: its groups
"""
