"""Count parameters and multiply-adds of every listed model into the table that ``linvision models`` reads."""

import json
from pathlib import Path

from timm.models import split_model_name_tag

from linvision.models import list_models
from linvision.models.counts import TABLE, count

FILE = Path(__file__).parents[1] / "src/linvision/models" / TABLE


def main() -> None:
    """Write the table."""
    names = sorted({split_model_name_tag(name)[0] for name in list_models()})
    lines = (f'  "{name}": {json.dumps(count(name))}' for name in names)
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
