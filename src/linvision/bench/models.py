"""Models as contenders: those under test, timm's DeiT of the same width, and models with their op in another form."""

from dataclasses import dataclass, replace

import torch
from timm.models import split_model_name_tag
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from linvision.bench.contenders import Lineup, Setting, Step
from linvision.models import create_model, resolve_name, set_checkpointing, size_overrides
from linvision.models.deit3.layers import RecomputingBlock, set_selective_checkpointing
from linvision.ops import use_backend
from linvision.ops.dispatch import OPS

DEIT = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
BY_WORD = {"tiny": 192, "small": 384, "base": 768}
FORMS = ("parallel", "sequential")  # of an op, as peers


@dataclass(frozen=True)
class ModelContender:
    """A model under test, one of its peers, or the model with its op in another form.

    Attributes:
        name: registered name.
        peer: "" under test; "fused" or "explicit": this attention, of a DeiT; "plain": all ops in plain PyTorch;
            "parallel" or "sequential": the op in this form.
        patch_size: of a DeiT that is to have other patches than its own.
    """

    name: str
    peer: str = ""
    patch_size: int | None = None

    @property
    def label(self) -> str:
        """Name and what is special."""
        notes = [self.peer] if self.peer else []
        notes += [f"patch {self.patch_size}"] if self.patch_size else []
        return f"{self.name} ({', '.join(notes)})" if notes else self.name

    @property
    def token_by_token(self) -> bool:
        """Whether the scan is a loop over tokens."""
        return self.peer == "sequential"

    def countable(self) -> "ModelContender":
        """Count a loop over tokens as the scan that it is."""
        return replace(self, peer="") if self.token_by_token else self

    def prepare(self, setting: Setting) -> Step:
        """Build the model and a batch of noise; a step is a forward pass, or in training a step of AdamW too."""
        model, image = self.build(setting)
        mode = "reduce-overhead" if setting.device == "cuda" else None  # CUDA graphs: small models wait for the host
        run = torch.compile(model, mode=mode) if setting.compile else model
        backend = self.peer if self.peer in ("plain", *FORMS) else setting.backend
        kind = setting.device if setting.device == "cuda" else "cpu"

        def forward() -> torch.Tensor:
            with (
                use_backend(backend),
                torch.autocast(kind, setting.torch_dtype, enabled=setting.autocast),
            ):
                return run(image)

        if setting.mode == "inference":
            return torch.inference_mode()(lambda: _discard(forward()))
        # Capturable: a step may become a CUDA graph.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, capturable=setting.device == "cuda")
        targets = torch.zeros(setting.batch_size, dtype=torch.long, device=image.device)

        def train() -> None:
            optimizer.zero_grad()
            cross_entropy(forward().float(), targets).backward()
            optimizer.step()

        return train

    def build(self, setting: Setting) -> tuple[nn.Module, torch.Tensor]:
        """Build the model and a batch of noise (B, 3, size, size)."""
        torch.manual_seed(setting.seed)
        dtype = torch.float32 if setting.autocast else setting.torch_dtype
        overrides = size_overrides(self.name, setting.size)
        if self.patch_size:
            overrides["patch_size"] = self.patch_size
        recomputes = setting.checkpointing == "selective" and self.name in DEIT.values()
        if recomputes:  # timm's blocks know the full kind alone
            overrides["block_fn"] = RecomputingBlock
        with torch.device(setting.device):
            model = create_model(self.name, **overrides)
            image = torch.randn(setting.batch_size, 3, setting.size, setting.size)
        for layer in model.modules():
            if self.peer in ("fused", "explicit") and hasattr(layer, "fused_attn"):
                setattr(layer, "fused_attn", self.peer == "fused")  # noqa: B010 - nn.Module types no plain attributes
        if recomputes:
            set_selective_checkpointing(model, True)
        else:
            set_checkpointing(model, setting.checkpointing)
        return model.to(dtype).train(setting.mode == "training"), image.to(dtype)


def model_lineup(names: list[str], peers: list[str]) -> Lineup:
    """List the models, each with its peers; a DeiT that serves several appears once.

    Raises:
        UnknownNameError: a model does not exist; the nearest ones are named.
    """
    contenders: dict[ModelContender, None] = {}
    references: dict[str, dict[str, str]] = {}
    for name in names:
        name, _ = split_model_name_tag(resolve_name(name))
        with torch.device("meta"):
            model = create_model(name)
        deit, patch_size = yardstick(name, model)
        deits = [ModelContender(deit, kind, patch_size) for kind in ("fused", "explicit") if kind in peers]
        own = [ModelContender(name)] if name != deit or not deits else []  # a DeiT is its own peer
        own += [ModelContender(name, "plain")] if "plain" in peers and uses_our_ops(model) else []
        own += [ModelContender(name, form) for form in FORMS if form in peers and has_form(model, form)]
        contenders |= dict.fromkeys([*own, *deits])
        for group, others in ((own, [*deits, *own]), (deits, deits)):
            for one in group:
                references[one.label] = {other.peer: other.label for other in others if other.peer and other != one}
    return Lineup(tuple(contenders), references)


def yardstick(name: str, model: nn.Module) -> tuple[str, int | None]:
    """Choose the DeiT to compare a model with: by the word tiny, small or base in its name, else by its width.

    Returns:
        its name and its patch size, None for its own. Its patches are as large as the model's, for as many tokens.
    """
    width = next((width for word, width in BY_WORD.items() if word in name), 0) or min(
        DEIT, key=lambda width: abs(width - getattr(model, "num_features", 192))
    )
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    patch_size = projection.kernel_size[0] if isinstance(projection, nn.Conv2d) else 16
    return DEIT[width], None if patch_size == 16 else patch_size


def uses_our_ops(model: nn.Module) -> bool:
    """Tell whether a model has layers of ours, and with them ops that run in several backends."""
    return any(type(layer).__module__.startswith("linvision.") for layer in model.modules())


def has_form(model: nn.Module, form: str) -> bool:
    """Tell whether a model, on the meta device, calls an op that exists in this form."""
    if not uses_our_ops(model):
        return False
    channels, rows, columns = getattr(model, "default_cfg")["input_size"]  # noqa: B009 - nn.Module types no such thing
    with torch.no_grad(), CalledOps() as called:
        model.eval()(torch.empty(1, channels, rows, columns, device="meta"))
    return any(form in OPS[op].forms for op in called.names & OPS.keys())


class CalledOps(TorchDispatchMode):
    """Notes the names of those of our operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and note its name."""
        if func.namespace == "linvision":
            self.names.add(func._schema.name.removeprefix("linvision::"))
        return func(*args, **(kwargs or {}))


def _discard(_: object) -> None:
    pass
