"""Training, stitching, calibrating and profiling image families."""
