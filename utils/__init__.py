"""Shared runtime: errors, signals, files, random streams, options, checkpoints, processes, training bookkeeping."""
