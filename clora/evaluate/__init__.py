"""Scores and reports of editing methods."""
