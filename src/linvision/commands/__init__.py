"""The commands, one file each; a command is importable without torch.

Its module has ``EXAMPLE``, the dataclass ``Options`` (a field without a default is a positional argument, the docstring
holds the help texts) and ``run(options)``, which returns the exit code and imports what it works with. ``POSITIONAL``
names fields with a default that are positional, ``CONFIG = True`` lets --config read options from YAML, ``GROUPS``
orders the options of a long help, and ``shown_defaults(arguments)`` names defaults that lie elsewhere.
"""

# In the order of the help, each with what it does.
COMMANDS = {
    "models": "list models with their size, cost and published accuracy",
    "train": "train a model",
    "eval": "measure a run or published weights",
    "predict": "use a model on images",
    "convert": "turn released files into safetensors and back",
    "recipes": "list the recipes of training runs with their cost and result",
    "bench": "measure time and memory beside DeiT",
}
