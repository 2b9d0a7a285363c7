"""The command ``linvision convert``: released files and state dicts to safetensors and back."""

import io
from dataclasses import dataclass
from pathlib import Path

from linvision.console import output
from linvision.errors import UsageError

EXAMPLE = """linvision convert vil2_tiny16_e800_in1k.th vil2_tiny.safetensors
  linvision convert vil2_tiny.safetensors vil2_tiny.th --model vil2-tiny"""

TORCH_SUFFIXES = (".th", ".pth", ".pt")


@dataclass(frozen=True)
class Options:
    """What to convert into what.

    Attributes:
        source: a released file, a state dict of the published hub, safetensors, or the folder of a run
        target: the file to write; .safetensors for safetensors, .th, .pth or .pt for a torch file
        model: name of the model, to write a torch file in the layout in which its family is released instead of a
            plain state dict
        ema: take the exponential moving average that the file carries beside the weights
    """

    source: str
    target: str
    model: str | None = None
    ema: bool = False


def run(options: Options) -> int:
    """Run ``linvision convert``."""
    target = Path(options.target)
    if target.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UsageError(f"{target}: the suffix tells what to write, .safetensors or {', '.join(TORCH_SUFFIXES)}")
    if target.exists():
        raise UsageError(f"{target} exists already: remove it, or choose another name")
    if options.model is not None and target.suffix == ".safetensors":
        raise UsageError("--model is for released torch files: safetensors always carry the model's own keys")
    import torch

    from linvision.files import replacing, write_weights
    from linvision.models import is_run, load_state_dict, own_keys, to_release, trained_weights

    source = trained_weights(options.source) if is_run(options.source) else options.source
    state_dict = own_keys(load_state_dict(source, ema=options.ema))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        write_weights(target, state_dict)
    else:
        buffer = io.BytesIO()
        torch.save(state_dict if options.model is None else to_release(options.model, state_dict), buffer)
        with replacing(target) as temporary:
            temporary.write_bytes(buffer.getvalue())
    output().print(f"{target}: {len(state_dict)} tensors, {target.stat().st_size / 1e6:.1f} MB", markup=False)
    return 0
