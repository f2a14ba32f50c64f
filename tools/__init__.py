"""Programs around the method, run as `python -m tools.NAME`. Nothing imports them."""
