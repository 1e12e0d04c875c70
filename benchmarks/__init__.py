"""Measurements: every number that the README names comes from here, with its machine, versions, n and spread."""
