"""What a saved model carries beside its weights: ``modeling_dotmoe.py``, which loads it where this package is not installed."""
