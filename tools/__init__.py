"""Programs around the method, run as `python -m tools.NAME`. The other packages do not import this one."""
