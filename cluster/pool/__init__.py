"""A Ray cluster and what runs on it: the local pool, the serving graph, submitted jobs, Kubernetes manifests."""
