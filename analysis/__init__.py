"""Reads results: plots, statistics, reports. Imports pipesim, never the other way round."""
