"""Training, stitching, calibration and profiling of image families."""
