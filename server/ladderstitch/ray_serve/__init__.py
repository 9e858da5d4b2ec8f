"""All of Ray: deployments, ranks as actors, live settings, the autoscaler."""
