"""Networks and losses.

`resynthesis.py` defines the detector, `losses.py` defines the losses, and `build.py` creates networks by name.
"""
