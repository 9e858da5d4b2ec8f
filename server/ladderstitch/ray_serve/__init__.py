"""Everything that uses Ray: deployments, ranks as actors, shared settings, the autoscaler."""
