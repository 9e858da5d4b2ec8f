"""The scheduler of image requests: queue, admission, planning and dispatch."""
