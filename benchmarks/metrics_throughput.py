"""Seconds and memory of every metric at the papers' size: 50,000 images of 2,048 features against as many.

    python benchmarks/metrics_throughput.py [--count 50000] [--features 2048] [--reference 50000]

Random features, as an evaluation keeps them on disk. Writes benchmarks/results/metrics_throughput.json.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from dd2.evaluation.bank import feature_bank
from dd2.evaluation.metrics import MetricConfig, scores
from dd2.evaluation.reference import of_bank
from dd2.training.store import Store


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--reference", type=int, default=50_000)
    arguments = parser.parse_args()

    def bank(root: Path, name: str, count: int) -> Store:
        def make(index: Tensor) -> dict[str, Tensor]:
            random = torch.Generator().manual_seed(int(index[0]) + len(name))
            pool = torch.randn(len(index), arguments.features, generator=random).abs()
            return {"pool": pool, "probabilities": torch.randn(len(index), 1000, generator=random).softmax(1)}

        return feature_bank(root, name, {"name": name}, count, 2000, make)

    with tempfile.TemporaryDirectory() as folder:
        samples, real = bank(Path(folder), "samples", arguments.count), bank(Path(folder), "reference", arguments.reference)
        start = time.perf_counter()
        reference = of_bank(real, {})
        prepared = time.perf_counter() - start
        found = scores(samples, reference, MetricConfig(halves=0))
        seconds = time.perf_counter() - start
    result = {
        **vars(arguments),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "seconds_reference": prepared,
        "seconds": seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "metrics": sorted(found),
    }
    print(json.dumps(result, indent=2))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "metrics_throughput.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
