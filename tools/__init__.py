"""Command-line programs besides training and testing. Start a program with `python -m tools.NAME`.

Except for the tests, no module outside the package `tools` imports it.
"""
