"""Queue, admission, planning and dispatch of image requests."""
