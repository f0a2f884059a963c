"""One file an engine, each run in that engine's environment: ``Engine(folder, options)`` with ``generate`` and ``score``."""
