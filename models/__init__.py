"""Networks and losses. `resynthesis.py` holds the method, `losses.py` the losses, `build.py` the creation by name."""
