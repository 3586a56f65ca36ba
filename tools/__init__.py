"""Commands besides training, evaluation and prediction, started with `python -m tools.NAME`. Nothing imports them."""
