from .op import cls_attention_scores as cls_attention_scores
from .op import key_similarity_scores as key_similarity_scores
from .op import mean_attention_scores as mean_attention_scores
from .op import value_weighted_scores as value_weighted_scores
