"""The gRPC protocols: our own service and the Open Inference Protocol."""
