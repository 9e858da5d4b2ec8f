"""gRPC and HTTP servers: requests in, answers out; the only package that knows both protocols."""
