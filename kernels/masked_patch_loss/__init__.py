from .op import masked_patch_loss as masked_patch_loss
