"""Command-line programs besides training and testing. Start a program with `python -m tools.NAME`.

No other package imports `tools`.
"""
