"""The models that a replica hosts: their registry, their runners, and loading and unloading."""
