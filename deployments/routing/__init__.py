"""From a model name to the replica that answers, and the bytes back."""
