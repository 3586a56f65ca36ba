"""What is known of finished runs: numbers, tables and figures, all from kept logits and the labels.

Nothing that trains imports this package, and nothing in it sees an optimizer.
"""
