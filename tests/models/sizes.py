"""The registered names, without guesses: small sizes for tests, and those that are listed."""

from timm.models import split_model_name_tag

from linvision.models import list_models
from linvision.models.registry import FAMILIES

TEST_SIZES = [name for family in FAMILIES for name in family.default_cfgs if name.startswith("test_")]
LISTED = sorted({split_model_name_tag(name)[0] for name in list_models()})
