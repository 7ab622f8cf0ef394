"""What the cluster is: configuration, model, plan, and the launcher that starts it."""
