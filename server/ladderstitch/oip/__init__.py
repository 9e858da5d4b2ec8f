"""Messages and services generated from the Open Inference Protocol in `protos`."""
