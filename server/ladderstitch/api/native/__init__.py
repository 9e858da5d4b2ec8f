"""`ladderstitch.v1`: inference, generation, administration, load reports."""
