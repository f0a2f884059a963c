"""The benches on a GPU: ``python -m bench.gpu`` runs the marked tests of a part, then its benches. ``suite.py`` says how."""
