"""What one replica has loaded: models by name, their runners, and how they come and go."""
