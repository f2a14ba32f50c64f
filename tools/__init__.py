"""Command-line programs other than train_sr.py, train_detector.py and test.py.

Start a program with `python -m tools.NAME`.
"""
