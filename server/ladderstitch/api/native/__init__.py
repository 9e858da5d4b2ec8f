"""The services of `ladderstitch.v1`: inference, generation, administration and load reports."""
