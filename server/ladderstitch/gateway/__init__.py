"""One address in front of several replicas: each call goes to the replica with the most slack.

The gateway uses gRPC and the replicas' load reports. It never decodes a request, and it imports
neither torch nor Ray.
"""
