"""Whole jobs, each behind one command."""
