"""Draws the report and the animation of scripts/demo.py."""
