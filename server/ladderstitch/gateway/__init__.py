"""One address in front of several replicas: forwards bytes to the one with the most slack.

Knows gRPC and what replicas say of themselves; never decodes a request, and imports neither torch
nor Ray.
"""
