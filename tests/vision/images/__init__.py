"""Tests of encoded images: headers, decoding, and the processes that decode."""
