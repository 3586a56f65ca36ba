"""Plumbing that knows neither an image nor a recipe: errors, files, command lines, text, figure style."""
