"""Programs around the method, run as `python -m tools.NAME`. No other package imports `tools`."""
