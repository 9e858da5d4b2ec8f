"""Tests of the engines of image models."""
