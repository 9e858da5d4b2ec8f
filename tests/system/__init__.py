"""Tests that cross processes: servers, ranks, workers, Ray, Prometheus."""
