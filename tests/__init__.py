"""Tests of what a user relies on. Each file says which part of the project it is about."""
