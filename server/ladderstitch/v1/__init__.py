"""Messages and services generated from `protos/ladderstitch/v1`."""
