"""Model bundles: those that ship with the package, and where fetched ones are kept."""
