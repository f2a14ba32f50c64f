"""The networks. `resynthesis.py` is the method, `losses.py` holds every loss, `build.py` turns names into networks."""
