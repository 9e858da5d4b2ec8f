"""The gRPC and HTTP servers: they authenticate, check and translate requests and answers."""
