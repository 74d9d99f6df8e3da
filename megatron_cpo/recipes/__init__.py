"""Recipes: from a model and a file of records to trained, evaluated models, by our commands."""
