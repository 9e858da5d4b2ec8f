"""Load tests, policy simulation, benchmarks and fault injection for ladderstitch servers."""
