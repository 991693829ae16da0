"""From one command to a cluster: submitting a command as a Ray job, the manifests, the cluster's state, the cost.

In: a command and its config, or a config alone. Out: the driver's own exit code; YAML; tables. The commands themselves
are not known here, and nothing of Kubernetes is called: manifests are text.
"""
