"""A cluster of two nodes on this machine, for tests: prints its address, and obeys its stdin.

python -m tests.ray_nodes CPUS CPUS

`kill` kills the second node as a power cut would; the end of stdin ends the cluster.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

STORE = 100 * 2**20


def main() -> None:
    """Run until stdin ends."""
    first, second = map(int, sys.argv[1:])
    head = {"num_cpus": first, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    other = cluster.add_node(num_cpus=second, object_store_memory=STORE)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line == "kill\n":
            cluster.remove_node(other, allow_graceful=False)
            print("killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
