from .op import token_scores as token_scores
