"""How much faster are two Ray nodes than one?

    python benchmarks/ray_scaling.py --images FOLDER --output ray_scaling.json

Captions the images of a folder with `caption_with_ray` on local clusters of one node and of two nodes, with one CPU and one model
each, in turn. The models load before the time is taken. Nodes of one machine share its cores, memory and disk, so the figures say
how much Ray costs, not what further machines bring.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from hf_attncap.atomic import write_json
from hf_attncap.ray_captions import caption_dataset

MEMORY = 500 * 2**20


def rate(files: list[Path], nodes: int, model: str | None) -> float:
    """Images per second on a cluster of so many nodes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        rows = ray.data.from_items([{"image": str(file)} for file in files], override_num_blocks=max(len(files) // 16, 2 * nodes))
        found, first, start = 0, 0, 0.0
        for batch in caption_dataset(rows, model, batch_size=16, concurrency=nodes).iter_batches(batch_size=None):
            found += len(batch["caption"])
            if not first:
                first, start = found, time.monotonic()
        return (found - first) / (time.monotonic() - start)
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="a folder of JPEGs")
    parser.add_argument("--limit", type=int, default=300, help="images (default: 300)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each cluster (default: 2)")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint (default: the one in the package)")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "ray_scaling.json")
    args = parser.parse_args()
    files = sorted(args.images.glob("*.jpg"))[: args.limit]
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for nodes, rates in found.items():
            rates.append(rate(files, nodes, args.model))
            print(f"{nodes} nodes: {rates[-1]:.2f} images per second", flush=True)
    medians = {str(nodes): statistics.median(rates) for nodes, rates in found.items()}
    write_json(args.output, {"images": len(files), "images_per_second": medians, "all": {str(n): r for n, r in found.items()}})
    print(f"two nodes against one: {medians['2'] / medians['1']:.2f}")


if __name__ == "__main__":
    main()
