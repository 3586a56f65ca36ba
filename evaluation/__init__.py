"""Turns finished runs into numbers, tables and figures, from logits and labels. It sees no optimizer."""
