"""The live graph: Ray Serve applications for the gateway and the fleet of vLLM replicas."""
