"""Procedural chest radiographs, for trials that need no patient."""
