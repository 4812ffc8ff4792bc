"""Hostile input made by the thousand: how it is made, what must hold of it, and what it found."""
