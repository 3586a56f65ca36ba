"""Measurements that the documents quote, started with `python -m benchmarks.NAME`. Nothing imports them."""
