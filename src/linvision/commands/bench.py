"""The command ``linvision bench``."""

from linvision.bench.options import BenchOptions

EXAMPLE = """linvision bench --models vil2-tiny,vim_tiny_patch16_224 --sizes 224,512,1248 --out bench
  linvision bench --op mlstm --modes inference,training"""

Options = BenchOptions
GROUPS = {
    "what": "models op sizes batch_sizes dtypes modes peers width seed",
    "how": "backend compile autocast tf32 checkpointing device threads",
    "measurement": "rounds seconds max_memory",
    "output": "out overwrite json markdown",
}


def run(options: Options) -> int:
    """Run ``linvision bench``."""
    from linvision.bench.command import bench

    return bench(options)
