"""Workers and ranks that are killed or stopped under load: load, faults, health and verdicts."""
