"""Trains the embedded model from random weights; start at recipe.py."""
