"""Tools for porters: record every stage of a run, compare another with it, name what is wrong."""
