"""L2ViT ("The Linear Attention Resurrection in Vision Transformer")."""
