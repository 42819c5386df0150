from .op import masked_patch_embed as masked_patch_embed
