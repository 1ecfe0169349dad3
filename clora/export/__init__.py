"""Deployable artefacts, each proved equal to the eager model."""
