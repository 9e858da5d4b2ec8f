"""Image models: bundle, preprocessing, scheduler, engine, stitched networks."""
